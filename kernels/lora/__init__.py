"""Low-rank terms that adapters add to linear layers, grouped by adapter."""
