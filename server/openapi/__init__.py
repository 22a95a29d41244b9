"""The description of all routes, made of the routes themselves."""
