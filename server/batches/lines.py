"""The input file of a batch: checked as a whole first, then read line by line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from oxillama_torch.errors import RequestError
from oxillama_torch.server.strict_json import loads

__all__ = ["ENDPOINTS", "MAX_LINES", "BadLine", "Line", "Scan", "read_line", "scan"]

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_LINES = 50_000
_MAX_CUSTOM_ID = 512
# Errors that a batch reports; a wrong file has the same one on every line.
_MAX_ERRORS = 100


@dataclass(frozen=True, slots=True)
class Line:
    """Where a request stands in the file.

    Args:
        number: from 1, blank lines counted.
    """

    number: int
    offset: int
    nbytes: int


class BadLine(Exception):  # noqa: N818 (becomes an entry of the batch's errors)
    """A line that cannot be a request."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


@dataclass(slots=True)
class Scan:
    """What a file holds.

    Args:
        errors: as the batch object has them; with any, nothing of the file is run.
        model: the one that all lines name, or None.
    """

    lines: list[Line] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    model: str | None = None


def scan(content: BinaryIO, endpoint: str, max_line_bytes: int) -> Scan:
    """Check every line of a file.

    Args:
        max_line_bytes: what a request's body may have.
    """
    found = Scan()
    ids: set[str] = set()
    models: set[Any] = set()
    for line, data in _split(content, max_line_bytes):
        try:
            if len(found.lines) == MAX_LINES:
                raise BadLine("too_many_tasks", f"A batch can have at most {MAX_LINES} requests.")
            custom_id, body = _parse(line, data, endpoint, max_line_bytes)
            if custom_id in ids:
                raise BadLine(
                    "duplicate_custom_id",
                    f"The custom_id {custom_id!r} is used by an earlier line.",
                    "custom_id",
                )
        except BadLine as error:
            found.errors.append(_error(error, line.number))
            if len(found.errors) == _MAX_ERRORS or error.code == "too_many_tasks":
                break
            continue
        ids.add(custom_id)
        models.add(body.get("model") if isinstance(body.get("model"), str) else None)
        found.lines.append(line)
    if not found.lines and not found.errors:
        found.errors.append(_error(BadLine("empty_file", "The input file has no requests."), None))
    if len(models) == 1:
        found.model = models.pop()
    return found


def read_line(content: BinaryIO, line: Line, endpoint: str) -> tuple[str, dict[str, Any]]:
    """The custom id and the body of a line that ``scan`` has passed."""
    content.seek(line.offset)
    return _parse(line, content.read(line.nbytes), endpoint, line.nbytes)


def _split(content: BinaryIO, max_line_bytes: int) -> Iterator[tuple[Line, bytes]]:
    """Lines that are not blank; of one that is too long, a part that is too long."""
    number = offset = 0
    while data := content.readline(max_line_bytes + 2):
        number += 1
        nbytes = len(data)
        while not data.endswith(b"\n") and (more := content.readline(max_line_bytes)):
            nbytes += len(more)
            if more.endswith(b"\n"):
                break
        if data.strip():
            yield Line(number, offset, nbytes), data
        offset += nbytes


def _parse(line: Line, data: bytes, endpoint: str, max_bytes: int) -> tuple[str, dict[str, Any]]:
    if len(data.rstrip(b"\r\n")) > max_bytes:
        raise BadLine("line_too_long", f"A line can have at most {max_bytes} bytes.")
    try:
        request = loads(data)
    except RequestError as error:
        raise BadLine("invalid_json_line", f"This line is not valid JSON: {error}.") from None
    if not isinstance(request, dict):
        raise BadLine("invalid_json_line", "This line is not a JSON object.")
    if "body" not in request and {"messages", "prompt", "input"} & request.keys():
        # OxiLLaMa's form: the line is the body.
        request = {"custom_id": f"line-{line.number}", "body": request}
    _check(request, endpoint)
    return request["custom_id"], request["body"]


def _check(request: dict[str, Any], endpoint: str) -> None:
    custom_id, body = request.get("custom_id"), request.get("body")
    for name, value, kind in (("custom_id", custom_id, str), ("body", body, dict)):
        if value is None:
            raise BadLine("missing_required_parameter", f"{name!r} is missing.", name)
        if not isinstance(value, kind):
            raise BadLine("invalid_type", f"{name!r} is of the wrong type.", name)
    if not 1 <= len(custom_id) <= _MAX_CUSTOM_ID:
        raise BadLine(
            "invalid_value", f"'custom_id' must have 1 to {_MAX_CUSTOM_ID} characters.", "custom_id"
        )
    if request.get("method", "POST") != "POST":
        raise BadLine("invalid_method", "The method must be POST.", "method")
    if request.get("url", endpoint) != endpoint:
        raise BadLine("invalid_url", f"The URL must be the batch's endpoint, {endpoint}.", "url")
    for name in ("stream", "background"):
        if body.get(name):
            raise BadLine(
                "unsupported_parameter", f"{name!r} is not possible in a batch.", f"body.{name}"
            )


def _error(error: BadLine, number: int | None) -> dict[str, Any]:
    return {"code": error.code, "line": number, "message": error.message, "param": error.param}
