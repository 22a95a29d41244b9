"""The OpenAI dialect: routes under /v1."""
