"""API keys: given at start, or in a file that is read again when it changes."""

from __future__ import annotations

import hmac
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from oxillama_torch.errors import UnsupportedError
from oxillama_torch.server.limits import Limits

__all__ = ["Key", "KeyRing", "fingerprint_of"]

log = logging.getLogger(__name__)

_CHECK_INTERVAL_S = 1.0
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_LIMIT = re.compile(r"(requests|tokens)=([1-9][0-9]{0,11})")
_OWNER = re.compile(r"owner=([\w.@-]{1,64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Key:
    """One accepted key.

    Args:
        digest: SHA-256 of the key: of one length whatever the key's, and nothing to steal.
        limits: its own limits per minute, or None.
        name: whose objects it reaches; None: it reaches its own alone.
    """

    digest: bytes
    limits: Limits | None = None
    name: str | None = None

    @property
    def id(self) -> str:
        """Names the key in logs without telling it."""
        return fingerprint_of(self.digest)

    @property
    def owner(self) -> str:
        """Whose the objects are that are made with this key."""
        return f"key:{self.id}" if self.name is None else f"name:{self.name}"


def fingerprint_of(digest: bytes) -> str:
    """A short name for a digest."""
    return digest.hex()[:12]


class KeyRing:
    """The keys that are accepted now. Thread-safe.

    Lines of the file: ``KEY [requests=N] [tokens=N] [owner=NAME]``, limits per minute; keys of one
    owner reach the same objects. ``sha256:HEX`` in place of a key keeps it out of the file; blank
    lines and those that start with ``#`` are skipped.

    Args:
        keys: accepted whatever the file says.
        path: the file, or None.

    Raises:
        UnsupportedError: the file cannot be read or has a line of another form.
    """

    def __init__(
        self,
        keys: tuple[str, ...],
        path: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fixed = tuple(Key(sha256(key.encode()).digest()) for key in keys)
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._read: tuple[Key, ...] = ()
        self._stamp: tuple[int, ...] | None = None
        self._next_check = 0.0
        if path is not None:
            self._stamp = self._stamp_of(path)
            self._read = _read_keys(path)
            self._next_check = clock() + _CHECK_INTERVAL_S

    @property
    def in_use(self) -> bool:
        """Whether requests need a key at all; an empty file lets nobody in."""
        return bool(self._fixed) or self._path is not None

    def find(self, token: str) -> Key | None:
        """The key that ``token`` is, or None."""
        self._refresh()
        digest = sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        # All keys are compared, so that the time does not tell which one was close.
        for key in (*self._fixed, *self._read):
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def with_id(self, key_id: str) -> Key | None:
        """The key that is called so, if it is still accepted."""
        self._refresh()
        return next((key for key in (*self._fixed, *self._read) if key.id == key_id), None)

    def _refresh(self) -> None:
        """Read the file again when it has changed; while it is unsound the old keys stay."""
        if self._path is None or self._clock() < self._next_check:
            return
        with self._lock:
            self._next_check = self._clock() + _CHECK_INTERVAL_S
            try:
                stamp = self._stamp_of(self._path)
                if stamp != self._stamp:
                    self._read = _read_keys(self._path)
                    self._stamp = stamp
                    log.info("%d keys read from %s", len(self._read), self._path)
            except UnsupportedError as error:
                log.error("%s; the keys read before stay in force", error)

    @staticmethod
    def _stamp_of(path: Path) -> tuple[int, ...]:
        try:
            stat = os.stat(path)
        except OSError as error:
            raise UnsupportedError(f"key file {path}: {error.strerror}") from None
        return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read_keys(path: Path) -> tuple[Key, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UnsupportedError(f"key file {path}: {reason}") from None
    keys = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            keys.append(_parse(line, f"key file {path}, line {number}"))
    return tuple(keys)


def _parse(line: str, where: str) -> Key:
    secret, *settings = line.split()
    given = _DIGEST.fullmatch(secret)
    digest = bytes.fromhex(given[1]) if given else sha256(secret.encode()).digest()
    limits: dict[str, int] = {}
    name = None
    for setting in settings:
        match = _LIMIT.fullmatch(setting)
        named = _OWNER.fullmatch(setting)
        if match is not None and match[1] not in limits:
            limits[match[1]] = int(match[2])
        elif named is not None and name is None:
            name = named[1]
        else:
            raise UnsupportedError(where, ("KEY [requests=N] [tokens=N] [owner=NAME]",))
    return Key(digest, Limits(**limits) if limits else None, name)
