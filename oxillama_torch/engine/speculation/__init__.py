"""Speculation: guessing the next tokens of a request, so that one step can check several."""
