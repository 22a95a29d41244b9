"""The engine: requests in, token events out."""
