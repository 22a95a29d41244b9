"""Files that may be named over HTTP: those inside a folder that the server's owner has chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from oxillama_torch.errors import GGUFError, RequestError

__all__ = ["inside", "reading"]


def inside(root: Path | None, path: str, what: str) -> Path:
    """The file meant by ``path``; links are followed before it is judged.

    Args:
        root: paths are relative to it; None: nothing may be loaded over HTTP.
        what: ``model`` or ``adapter``.

    Raises:
        RequestError: 403.
    """
    if root is None:
        raise _forbidden(f"this server has no {what} root: {what}s are loaded at start only")
    if "\0" in path:
        raise RequestError("a path has no null byte", param="path")
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise _forbidden(f"the path is outside of the {what} root")
    return resolved


@contextlib.contextmanager
def reading(path: Path, given: str, what: str) -> Iterator[None]:
    """Turn the errors of a file that cannot be read into the caller's.

    Args:
        path: the file; given: how the caller named it, and is told of it.

    Raises:
        RequestError: 404 where there is no such file, else 400.
    """
    if not path.exists():
        raise RequestError(
            f"there is no {what} {given!r}", status=404, code="file_not_found", param="path"
        )
    try:
        yield
    except (GGUFError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        reason = str(reason).replace(str(path), given)
        raise RequestError(f"cannot read the {what}: {reason}", param="path") from error


def _forbidden(message: str) -> RequestError:
    return RequestError(
        message, status=403, code="forbidden", param="path", type="permission_error"
    )
