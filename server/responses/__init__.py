"""The Responses API: items, the turn that answers them, its events, and what is kept."""
