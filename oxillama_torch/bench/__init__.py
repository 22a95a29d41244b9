"""Measuring: kernels, end to end, load."""
