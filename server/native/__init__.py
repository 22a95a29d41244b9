"""llama-server dialect: unprefixed routes."""
