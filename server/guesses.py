"""Wrong credentials are counted by the address they come from, so that nobody can try many.

Behind one address there may be a whole office, or a proxy with everybody, and whoever guesses must
not shut the others out. So a right credential that is too long to be guessed always passes: there
is nothing to protect it from. A shorter one is not even looked at while its address has no guess
left, because the answer would tell. That is over seconds after the guessing is.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from oxillama_torch.errors import RequestError
from oxillama_torch.server.limits import Allowance, Limiter, Limits, RateLimited

__all__ = ["LEAST_UNGUESSABLE", "PER_MINUTE", "Guesses", "WrongCredential"]

#: Wrong credentials that an address may send.
PER_MINUTE = 20
#: Characters that a credential must have so that nobody guesses it: 80 bits in hexadecimal.
LEAST_UNGUESSABLE = 20
# Whoever has one address of IPv6 has the network.
_IPV6_PREFIX = 64

T = TypeVar("T")


class WrongCredential(RequestError):
    """A key or token that nobody was given: it may be a guess."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message, status=401, code=code)


class TooManyGuesses(RequestError):
    """An address has sent too many wrong credentials."""

    def __init__(self, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(
            "Too many wrong credentials came from this address. Please try again later.",
            status=429,
            code="too_many_wrong_credentials",
            type="requests",
        )


class Guesses:
    """The wrong credentials of late, by address. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._limiter = Limiter(Limits(requests=PER_MINUTE), clock)
        self._lock = threading.Lock()

    def judge(self, address: str | None, credential: str, decide: Callable[[], T]) -> T:
        """Call ``decide``, which judges a credential, while the address has guesses left.

        Raises:
            TooManyGuesses: in place of ``WrongCredential``, and for any short credential.
            what ``decide`` raises.
        """
        if not credential:
            return decide()  # nothing sent, nothing guessed
        left = self._limiter.allowance(_network(address))
        if len(credential) >= LEAST_UNGUESSABLE:
            try:
                return decide()
            except WrongCredential:
                _take(left)
                raise
        # One at a time: guesses that come together are as many guesses.
        with self._lock:
            _take(left)
            wrong = False
            try:
                return decide()
            except WrongCredential:
                wrong = True
                raise
            finally:
                if not wrong:
                    left.give_back()


def _take(left: Allowance) -> None:
    try:
        left.admit()
    except RateLimited as error:
        raise TooManyGuesses(error.retry_after_s) from None


def _network(address: str | None) -> str:
    """What belongs to one client: an address of IPv4, a network of IPv6."""
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return str(address)
    if parsed.version == 4:
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))
