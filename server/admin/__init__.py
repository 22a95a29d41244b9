"""Administration: routes under /admin, with a token of their own."""
