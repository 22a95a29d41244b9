"""What outlives a request: rows in a database, blobs in a folder beside it."""
