"""Reading requests and dressing answers: body checks, ids, headers, authentication."""

from __future__ import annotations

import hmac
import ipaddress
import re
import time
import uuid
from hashlib import sha256

import orjson
from flask import Flask, Response, g, request

from oxillama_torch.config import ServerConfig
from oxillama_torch.errors import EngineError, RequestError

__all__ = ["client_socket", "install", "json_body", "new_id"]

_VALID_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
PUBLIC_PATHS = frozenset({"/health"})


def new_id(prefix: str) -> str:
    """A random id such as ``chatcmpl-...``."""
    return f"{prefix}-{uuid.uuid4().hex}"


def client_socket():
    """The connection's socket where the WSGI server hands it out (gunicorn does), else None."""
    return request.environ.get("gunicorn.socket")


def json_body() -> dict:
    """The request's JSON object.

    Raises:
        RequestError: not JSON, not an object, or shorter than announced (a WSGI server hands out
            what has arrived when the client half-closes).
    """
    raw = request.get_data(cache=False)
    if request.content_length is not None and len(raw) != request.content_length:
        raise RequestError("the body is shorter than its Content-Length", code="invalid_request")
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(
            f"the body is not valid JSON (line {error.lineno}, column {error.colno})",
            code="invalid_json",
        ) from None
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object", code="invalid_type")
    return body


def install(app: Flask, config: ServerConfig) -> None:
    """Request ids, timing headers, the body limit and bearer keys for every route."""
    app.config["MAX_CONTENT_LENGTH"] = config.max_body_bytes
    # Digests: compared in constant time, and of one length whatever the key's.
    keys = [sha256(key.encode()).digest() for key in config.api_keys]
    admin = [sha256(config.admin_token.encode()).digest()] if config.admin_token else []

    @app.before_request
    def begin() -> None:
        g.started = time.perf_counter()
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _VALID_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        is_admin = request.path.startswith("/admin/")
        if app.extensions["lifecycle"].draining and not (is_admin or request.path in PUBLIC_PATHS):
            raise EngineError("the server is shutting down")
        if is_admin:
            _authenticate_admin(admin)
        elif keys and request.path not in PUBLIC_PATHS:
            _authenticate(keys)

    @app.after_request
    def finish(response: Response) -> Response:
        response.headers["x-request-id"] = g.get("request_id", "")
        elapsed_ms = (time.perf_counter() - g.get("started", time.perf_counter())) * 1e3
        response.headers["openai-processing-ms"] = str(round(elapsed_ms))
        response.headers["openai-version"] = "2020-10-01"
        return response


def _authenticate_admin(keys: list[bytes]) -> None:
    """The admin token; where none is set, a peer on this machine. Forwarded headers say nothing."""
    if keys:
        _authenticate(keys)
    elif not ipaddress.ip_address(request.remote_addr or "0.0.0.0").is_loopback:
        raise RequestError(
            "Administration from other machines needs an admin token.",
            status=403,
            code="forbidden",
            type="permission_error",
        )


def _authenticate(keys: list[bytes]) -> None:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = request.headers.get("X-Api-Key", "")
    digest = sha256(token.encode()).digest()
    # All keys are compared, so that the time does not tell which one was close.
    if sum(hmac.compare_digest(digest, key) for key in keys) == 0:
        raise RequestError("Incorrect API key provided.", status=401, code="invalid_api_key")
