"""Calling a route from inside of the server, through everything that a client's request meets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flask import Flask, g
from werkzeug.test import EnvironBuilder, run_wsgi_app

from oxillama_torch.server.priority import BACKGROUND, priority
from oxillama_torch.server.store.owner import acting_for, current_owner

__all__ = ["CALLER", "Outcome", "call", "this_caller"]

#: Key of the WSGI environment that names the caller of an internal request. No client can set it:
#: what comes from outside has upper-case keys.
CALLER = "oxillama.caller"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a route has answered."""

    status: int
    body: bytes
    request_id: str
    retry_after_s: float


def this_caller() -> dict[str, Any]:
    """Who makes the current request, for work that is done in his name later."""
    return {
        "holder": g.holder,
        "by_key": g.get("by_key", False),
        "scopes": g.get("scopes"),
        "owner": current_owner(),
    }


def call(app: Flask, path: str, body: bytes, caller: dict[str, Any]) -> Outcome:
    """POST a JSON body and wait for the answer; behind everybody who waits for one of his own.

    Args:
        caller: in whose name, as ``this_caller`` had it.
    """
    builder = EnvironBuilder(path=path, method="POST", data=body, content_type="application/json")
    try:
        environ = builder.get_environ()
    finally:
        builder.close()
    environ[CALLER] = caller
    with priority(BACKGROUND), acting_for(caller["owner"]):
        pieces, status, headers = run_wsgi_app(app.wsgi_app, environ, buffered=True)
    return Outcome(
        int(status.split(" ", 1)[0]),
        b"".join(pieces),
        headers.get("x-request-id", ""),
        headers.get("Retry-After", 1.0, type=float),
    )
