"""Reading requests and dressing answers: bodies, ids, headers, accounts."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Any, TypeVar

import pydantic
from flask import Flask, Response, current_app, g, request
from werkzeug.routing import Rule

from oxillama_torch.config import ServerConfig
from oxillama_torch.errors import RequestError
from oxillama_torch.server import strict_json
from oxillama_torch.server.access import PUBLIC_PATHS, Access
from oxillama_torch.server.access_log import AccessLog
from oxillama_torch.server.metering import Meter
from oxillama_torch.server.metrics import Metrics

__all__ = [
    "client_socket",
    "install",
    "json_array",
    "json_body",
    "name_ignored",
    "new_id",
    "parsed",
]

_VALID_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_READ_BYTES = 64 * 1024
_MOST_NAMED = 32

M = TypeVar("M", bound=pydantic.BaseModel)


def new_id(prefix: str) -> str:
    """A random id such as ``chatcmpl-...``."""
    return f"{prefix}-{uuid.uuid4().hex}"


def client_socket():
    """The connection's socket where the WSGI server hands it out (gunicorn does), else None."""
    return request.environ.get("gunicorn.socket")


def json_body() -> dict:
    """The request's JSON object.

    Raises:
        RequestError: not declared as JSON (415), no strict JSON, not an object, or shorter than
            announced (a WSGI server hands out what has arrived when the client half-closes).
        RequestEntityTooLarge: longer than allowed.
    """
    body = _json()
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object", code="invalid_type")
    return body


def parsed(model: type[M]) -> M:
    """The request's JSON object as ``model``; fields that nothing reads will be named."""
    body = model.model_validate(json_body())
    g.ignored_fields = sorted(body.model_extra or ())
    return body


def name_ignored(response: Response, names: Sequence[str]) -> None:
    """Name fields that nothing reads in a header, so that no typing error passes unseen."""
    if names:
        plain = (n if n.isascii() and n.isprintable() else ascii(n) for n in names[:_MOST_NAMED])
        response.headers["x-ignored-fields"] = ", ".join(name[:64] for name in plain)


def json_array() -> list:
    """The request's JSON array; errors as ``json_body``."""
    body = _json()
    if not isinstance(body, list):
        raise RequestError("the body must be a JSON array", code="invalid_type")
    return body


def _json() -> Any:
    _check_content_type()
    return strict_json.loads(_raw_body())


def _check_content_type() -> None:
    """A body of another kind is refused, also because pages of other origins may send those."""
    kind, charset = request.mimetype, request.mimetype_params.get("charset", "utf-8").lower()
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if kind not in ("", "application/json") or charset != "utf-8" or encoding != "identity":
        raise RequestError(
            "the body must be 'Content-Type: application/json', in UTF-8 and not compressed",
            status=415,
            code="unsupported_media_type",
        )


def _raw_body() -> bytes:
    if request.content_length is None:
        # get_data() would cut a chunked body at the limit, and say nothing.
        return b"".join(iter(lambda: request.stream.read(_READ_BYTES), b""))
    raw = request.get_data(cache=False)
    if len(raw) != request.content_length:
        raise RequestError("the body is shorter than its Content-Length", code="invalid_request")
    return raw


def install(app: Flask, config: ServerConfig, metrics: Metrics) -> None:
    """For every route: request ids, the body limit, access, headers, metrics and the access log."""
    app.config["MAX_CONTENT_LENGTH"] = config.max_body_bytes
    access: Access = app.extensions["access"]
    log: AccessLog | None = app.extensions["access_log"]

    @app.before_request
    def begin() -> Response | None:
        g.meter = Meter(metrics)
        given = request.headers.get("X-Request-Id", "")
        g.request_id = given if _VALID_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        if current_app.extensions["lifecycle"].draining and not _always_has_room(request.path):
            # No fault of the server's, as an EngineError would be: not in the log, once a request.
            raise RequestError(
                "the server is shutting down", status=503, code="engine_error", type="server_error"
            )
        if (response := access.preflight(request)) is not None:
            return response
        access.admit(request)
        if client_socket() is not None and not _always_has_room(request.path):
            # Clients that send or read slowly hold a thread: never all of them.
            g.seat = current_app.extensions["lifecycle"].take_seat()
        if request.method == "OPTIONS" and request.url_rule is not None:
            return _options(app, request.url_rule)
        g.meter.allowance = g.get("allowance")
        return None

    @app.after_request
    def finish(response: Response) -> Response:
        if (leave := g.pop("seat", None)) is not None:
            response.call_on_close(leave)
        meter: Meter = g.meter
        response.headers["x-request-id"] = g.request_id
        response.headers["openai-processing-ms"] = str(round(meter.seconds * 1e3))
        response.headers["openai-version"] = "2020-10-01"
        name_ignored(response, g.get("ignored_fields", ()))
        access.dress(request, response)
        entry = {
            "request_id": g.request_id,
            "method": request.method,
            "path": request.path,
            "key": g.get("holder"),
        }
        endpoint = request.url_rule.rule if request.url_rule is not None else "none"
        response.call_on_close(lambda: _close(meter, endpoint, response, metrics, log, entry))
        return response


def _always_has_room(path: str) -> bool:
    """Whether a path is for those who look after the server, also while it takes no others."""
    return path in PUBLIC_PATHS or path.startswith("/admin/")


def _options(app: Flask, asked: Rule) -> Response:
    """What can be done here. Flask's own answer adds the methods of rules that match as well."""
    rules = (rule for rule in app.url_map.iter_rules() if rule.rule == asked.rule)
    response = Response(status=200)
    response.allow.update(method for rule in rules for method in rule.methods or ())
    return response


def _close(
    meter: Meter,
    endpoint: str,
    response: Response,
    metrics: Metrics,
    log: AccessLog | None,
    entry: dict,
) -> None:
    """The answer has been sent, or its client has gone."""
    meter.close()
    metrics.answered(endpoint, response.status_code, meter.seconds)
    if log is not None:
        log.write(
            {
                **entry,
                "status": response.status_code,
                "ms": round(meter.seconds * 1e3, 1),
                "model": meter.model,
                "prompt_tokens": meter.prompt_tokens,
                "completion_tokens": meter.completion_tokens,
            }
        )
