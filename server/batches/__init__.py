"""Batches: files of requests that are served behind everything else, and outlive a restart."""
