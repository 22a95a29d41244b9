"""GGML formats: one file per type."""
