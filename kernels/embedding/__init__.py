"""Rows of a packed embedding table."""
