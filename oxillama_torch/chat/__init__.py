"""One turn of a conversation: tools, reasoning, structured answers; for server and ``LLM``."""
