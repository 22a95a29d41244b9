"""The exception tree. Every error that leaves the library is one of these.

    OxiLlamaError
    ├── GGUFError         a file that is not what it claims to be (tensor, offset, expected)
    ├── UnsupportedError  a valid thing this build does not do (what, supported)
    ├── RequestError      the caller's fault (status, code, param)
    ├── CapacityError     no room now; try again later (retry_after_s)
    └── EngineError       the engine itself failed or has stopped

Raise these where data crosses a border (file, request, user tensor, environment); use ``assert``
with a sentence for what only a bug of ours can break.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "CapacityError",
    "EngineError",
    "GGUFError",
    "OxiLlamaError",
    "RequestError",
    "UnsupportedError",
]


class OxiLlamaError(Exception):
    """Base of every error raised on purpose by this library."""


class GGUFError(OxiLlamaError):
    """A malformed GGUF file.

    Args:
        message: what is wrong, in one line.
        path: the file, when known.
        tensor: name of the tensor or metadata key concerned, when there is one.
        offset: byte offset in the file where the problem was seen.
        expected: what would have been right.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        tensor: str | None = None,
        offset: int | None = None,
        expected: str | None = None,
    ) -> None:
        self.path, self.tensor, self.offset, self.expected = path, tensor, offset, expected
        details = [
            f"in {path}" if path else "",
            f"at byte {offset}" if offset is not None else "",
            f"tensor or key {tensor!r}" if tensor is not None else "",
            f"expected {expected}" if expected else "",
        ]
        super().__init__("; ".join([message, *(d for d in details if d)]))


class UnsupportedError(OxiLlamaError):
    """Something valid that this build does not support.

    Args:
        what: the thing asked for.
        supported: the alternatives that do exist, listed in the message.
    """

    def __init__(self, what: str, supported: Iterable[str] = ()) -> None:
        self.what, self.supported = what, tuple(supported)
        known = f"; supported: {', '.join(self.supported)}" if self.supported else ""
        super().__init__(f"{what}{known}")


class RequestError(OxiLlamaError):
    """A request that cannot be served as it stands.

    Args:
        message: for the caller, free of internals.
        status: HTTP status (400, 404, 413, ...).
        code: OpenAI error code such as ``invalid_value`` or ``context_length_exceeded``.
        param: path of the field, such as ``messages[0].content``.
        type: OpenAI error type.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = "invalid_value",
        param: str | None = None,
        type: str = "invalid_request_error",
    ) -> None:
        self.message, self.status, self.code, self.param, self.type = (
            message,
            status,
            code,
            param,
            type,
        )
        super().__init__(message)


class CapacityError(OxiLlamaError):
    """No room right now.

    Args:
        message: what is full.
        retry_after_s: seconds after which trying again makes sense.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class EngineError(OxiLlamaError):
    """The engine failed while serving a request, or is no longer running."""
