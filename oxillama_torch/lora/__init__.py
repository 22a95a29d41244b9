"""Adapters: read the peft way, attached to requests, merged into weights, combined."""
