"""Rotary position embedding and the KV write."""
