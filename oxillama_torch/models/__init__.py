"""Model configurations, architectures and the loader."""
