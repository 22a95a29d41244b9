"""The object of a response that has not begun."""

__all__ = ["skeleton"]


def skeleton(**fields):
    return {
        "id": "resp_1", "object": "response", "created_at": 1, "status": "in_progress",
        "model": "m", "output": [], "parallel_tool_calls": True, "tool_choice": "auto",
        "tools": [], "usage": None, "error": None, "incomplete_details": None,
        "completed_at": None, **fields,
    }  # fmt: skip
