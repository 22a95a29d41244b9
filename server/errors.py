"""Errors to HTTP: the OpenAI envelope with ``message``, ``type``, ``param`` and ``code``."""

from __future__ import annotations

import logging
import math

import pydantic
from flask import Flask, Response, g, jsonify, request
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound

from oxillama_torch.errors import (
    CapacityError,
    EngineError,
    OxiLlamaError,
    RequestError,
    UnsupportedError,
)

__all__ = [
    "code_of",
    "envelope",
    "from_validation",
    "install",
    "llama_envelope",
    "status_of",
    "told",
]

log = logging.getLogger(__name__)

_HTTP_CODES = {
    404: "unknown_url",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
}

# What the engine calls otherwise than the routes do.
_FIELDS = {"adapters": "lora"}


def envelope(error: Exception) -> dict:
    """The body for ``error``; internals of unexpected exceptions never leave the process."""
    message, kind, param, code = "internal error", "server_error", None, "internal_error"
    if isinstance(error, RequestError):
        message, kind, code = error.message, error.type, error.code
        param = _FIELDS.get(error.param, error.param)
    elif isinstance(error, CapacityError):
        message, kind, code = str(error), "requests", "rate_limit_exceeded"
    elif isinstance(error, EngineError):
        message, code = str(error), "engine_error"
    elif isinstance(error, UnsupportedError):
        message, kind, code = str(error), "invalid_request_error", "unsupported_value"
    elif isinstance(error, ParseException):
        message, kind, code = "malformed request", "invalid_request_error", "invalid_request"
    elif isinstance(error, HTTPException):
        message = _http_message(error)
        kind = "invalid_request_error" if (error.code or 500) < 500 else "server_error"
        code = _HTTP_CODES.get(error.code or 500, "http_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _http_message(error: HTTPException) -> str:
    """What went wrong; Flask's own words for a wrong URL are meant for readers of web pages."""
    if isinstance(error, NotFound):
        return f"There is no {request.method} {request.path}; GET /docs lists the routes."
    if isinstance(error, MethodNotAllowed):
        methods = ", ".join(sorted({*(error.valid_methods or ())} - {"HEAD", "OPTIONS"}))
        return f"{request.path} takes {methods}, not {request.method}."
    return error.description or error.name


# llama-server's names of types, by status.
_LLAMA_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
}


def llama_envelope(error: Exception) -> dict:
    """The body for ``error`` on llama-server's routes: its code is the status.

    ``param`` and ``reason``, the code that the other routes have, come on top.
    """
    status, inner = status_of(error), envelope(error)["error"]
    kind = _LLAMA_TYPES.get(status, "invalid_request_error")
    if inner["code"] == "context_length_exceeded":
        kind = "exceed_context_size_error"
    return {
        "error": {
            "code": status,
            "message": inner["message"],
            "type": kind,
            "param": inner["param"],
            "reason": inner["code"],
        }
    }


def code_of(error: Exception) -> str:
    """The envelope's code, as one word for counting."""
    return envelope(error)["error"]["code"] or "none"


def told(error: BaseException) -> OxiLlamaError:
    """What a client is told of ``error``: nothing of one that is not ours."""
    return error if isinstance(error, OxiLlamaError) else EngineError("internal error")


def status_of(error: Exception) -> int:
    """HTTP status for ``error``."""
    if isinstance(error, RequestError):
        return error.status
    if isinstance(error, HTTPException):
        return error.code or 500
    if isinstance(error, UnsupportedError | ParseException):
        return 400
    return {CapacityError: 429, EngineError: 503}.get(type(error), 500)


def from_validation(error: pydantic.ValidationError) -> RequestError:
    """The first problem pydantic found, with the field's path as OpenAI writes it.

    Where a field may be several things, the member that went furthest tells.
    """
    problems = [
        (_path(item["loc"]), item)
        for item in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    field = problems[0][0]
    same = [problem for problem in problems if problem[0][: len(field)] == field]
    path, first = max(same, key=lambda problem: len(problem[0]))
    param = ""
    for part in path:
        if isinstance(part, int):
            param += f"[{part}]"
        else:
            param += f".{part}" if param else str(part)
    code = {"missing": "missing_required_parameter"}.get(first["type"], "invalid_value")
    if first["type"].endswith(("_type", "_parsing")):
        code = "invalid_type"
    where = f" at {param}" if param else ""
    return RequestError(f"{first['msg']}{where}", code=code, param=param or None)


def _path(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    return tuple(part for part in location if isinstance(part, int) or not _is_union_tag(part))


def _is_union_tag(part: str) -> bool:
    """Pydantic puts the tried member of a union into the path: ``str``, ``list[...]``, a class."""
    simple = part.removeprefix("constrained-") in ("str", "int", "bool", "float")
    return simple or "[" in part or part[:1].isupper()


def install(app: Flask) -> None:
    """Answer every exception of every route with the envelope."""

    @app.errorhandler(Exception)
    def handle(error: Exception) -> tuple[Response, int]:
        if isinstance(error, pydantic.ValidationError):
            error = from_validation(error)
        status = status_of(error)
        if status >= 500 and not isinstance(error, RequestError):
            log.error("request %s failed", g.get("request_id"), exc_info=error)
        native = (request.blueprint or "").startswith("native")
        response = jsonify(llama_envelope(error) if native else envelope(error))
        app.extensions["metrics"].error(code_of(error))
        if status in (429, 503):
            seconds = getattr(error, "retry_after_s", 1)
            response.headers["Retry-After"] = str(max(1, math.ceil(seconds)))
        if status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        if status == 405 and isinstance(error, HTTPException):
            response.headers["Allow"] = ", ".join(getattr(error, "valid_methods", None) or [])
        return response, status
