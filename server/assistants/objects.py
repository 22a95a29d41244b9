"""The objects of the Assistants API as they go over the wire, when they are new."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

__all__ = [
    "RUN_LIFETIME_S",
    "Object",
    "new_assistant",
    "new_message",
    "new_run",
    "new_step",
    "new_thread",
    "text_content",
]

Object = dict[str, Any]

RUN_LIFETIME_S = 600


def new_assistant(fields: Mapping[str, Any]) -> Object:
    """An assistant with the fields of its body."""
    return {**_head("asst", "assistant"), **fields}


def new_thread(metadata: Mapping[str, str]) -> Object:
    """An empty thread."""
    return {**_head("thread", "thread"), "metadata": metadata, "tool_resources": {}}


def new_message(
    thread_id: str,
    role: str,
    texts: list[str],
    *,
    metadata: Mapping[str, str] | None = None,
    run: Mapping[str, Any] | None = None,
) -> Object:
    """A message of the user's, or one that a run is about to write."""
    return {
        **_head("msg", "thread.message"),
        "assistant_id": None if run is None else run["assistant_id"] or None,
        "attachments": [],
        "completed_at": None if run is not None else int(time.time()),
        "content": [text_content(text) for text in texts],
        "incomplete_at": None,
        "incomplete_details": None,
        "metadata": metadata or {},
        "role": role,
        "run_id": None if run is None else run["id"],
        "status": "completed" if run is None else "in_progress",
        "thread_id": thread_id,
    }


def text_content(text: str) -> Object:
    """A text as part of a message's content."""
    return {"type": "text", "text": {"value": text, "annotations": []}}


def new_run(thread_id: str, fields: Mapping[str, Any]) -> Object:
    """A queued run.

    Args:
        fields: what its body and its assistant say.
    """
    head = _head("run", "thread.run")
    empty = (
        "cancelled_at",
        "completed_at",
        "failed_at",
        "incomplete_details",
        "last_error",
        "required_action",
        "started_at",
        "usage",
    )
    return {
        **head,
        "thread_id": thread_id,
        "status": "queued",
        "expires_at": head["created_at"] + RUN_LIFETIME_S,
        **dict.fromkeys(empty),
        **fields,
    }


def new_step(run: Mapping[str, Any], kind: str, details: Object) -> Object:
    """A step in progress: ``message_creation`` or ``tool_calls``."""
    return {
        **_head("step", "thread.run.step"),
        "assistant_id": run["assistant_id"],
        "cancelled_at": None,
        "completed_at": None,
        "expired_at": None,
        "failed_at": None,
        "last_error": None,
        "metadata": {},
        "run_id": run["id"],
        "status": "in_progress",
        "step_details": {"type": kind, kind: details},
        "thread_id": run["thread_id"],
        "type": kind,
        "usage": None,
    }


def _head(prefix: str, kind: str) -> Object:
    return {"id": f"{prefix}_{uuid.uuid4().hex}", "object": kind, "created_at": int(time.time())}
