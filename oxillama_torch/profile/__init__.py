"""Where the time of a request goes: per layer, op and kernel."""
