"""Assistants: threads of messages, and the runs that continue them."""
