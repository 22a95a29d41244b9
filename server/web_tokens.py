"""JSON web tokens as credentials, through PyJWT (the extra ``jwt``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.server.guesses import WrongCredential

__all__ = ["Claims", "TokenVerifier", "needed_scope"]

SKEW_S = 60
_LEAST_SECRET_BYTES = 32


@dataclass(frozen=True, slots=True)
class Claims:
    """What a valid token says.

    Args:
        holder: who it was made for, as a short hash.
    """

    holder: str
    scopes: frozenset[str]


def needed_scope(method: str, path: str, websocket: bool) -> str:
    """The scope that a request needs; OxiLLaMa's names. A WebSocket is asked for with GET."""
    reads = method in ("GET", "HEAD", "OPTIONS")
    if path.startswith("/admin/"):
        return "admin:read" if reads else "admin:write"
    if path.rsplit("/", 1)[-1] in ("embeddings", "embedding"):
        return "embed:read"
    return "chat:read" if reads and not websocket else "chat:write"


class TokenVerifier:
    """Checks signature, times, audience and issuer.

    The kind of key decides the one algorithm that is accepted, so that a public key can never be
    taken for a shared secret, and ``none`` for nothing at all.

    Args:
        key_file: a PEM public key (RS256), or a shared secret of at least 32 bytes (HS256).
        audience, issuer: what the token must name; None: it is not looked at (a token with an
            audience is refused then).

    Raises:
        UnsupportedError: PyJWT is missing, or the key is no such thing.
    """

    def __init__(self, key_file: Path, audience: str | None, issuer: str | None) -> None:
        self._jwt = _pyjwt()
        self._audience, self._issuer = audience, issuer
        try:
            key = key_file.read_bytes().strip()
        except OSError as error:
            raise UnsupportedError(f"JWT key {key_file}: {error.strerror}") from None
        if key.startswith(b"-----BEGIN"):
            self._algorithm = "RS256"
            if b"PRIVATE" in key.partition(b"\n")[0]:
                raise UnsupportedError(f"JWT key {key_file}: a private key", ("a public key",))
            try:
                self._key = self._jwt.algorithms.RSAAlgorithm(
                    self._jwt.algorithms.RSAAlgorithm.SHA256
                ).prepare_key(key)
            except (ValueError, TypeError, self._jwt.exceptions.InvalidKeyError):
                raise UnsupportedError(f"JWT key {key_file}: no RSA public key") from None
        elif len(key) < _LEAST_SECRET_BYTES:
            raise UnsupportedError(
                f"JWT key {key_file}: a secret of {len(key)} bytes",
                (f"{_LEAST_SECRET_BYTES} bytes or more",),
            )
        else:
            self._algorithm, self._key = "HS256", key

    def verify(self, token: str) -> Claims:
        """The claims of a token.

        Raises:
            RequestError: 401, it has expired.
            WrongCredential: 401, without saying more than what a client may know.
        """
        try:
            claims = self._jwt.decode(
                token,
                self._key,
                algorithms=[self._algorithm],
                audience=self._audience,
                issuer=self._issuer,
                leeway=SKEW_S,
                options={"require": ["exp"]},
            )
        except self._jwt.exceptions.ExpiredSignatureError:
            message = "The token has expired."
            raise RequestError(message, status=401, code="invalid_token") from None
        except self._jwt.exceptions.PyJWTError:
            raise WrongCredential("The token is not valid.", "invalid_token") from None
        holder = sha256(f"jwt:{claims.get('sub', '')}".encode()).hexdigest()[:12]
        return Claims(holder, _scopes(claims))


def _scopes(claims: Mapping[str, Any]) -> frozenset[str]:
    """``scope`` (words of one text) or ``scopes`` (a list)."""
    found = claims.get("scope", claims.get("scopes", ()))
    words = found.split() if isinstance(found, str) else found
    if not isinstance(words, list | tuple):
        return frozenset()
    return frozenset(word for word in words if isinstance(word, str))


def _pyjwt() -> ModuleType:
    try:
        import jwt
    except ModuleNotFoundError:
        raise UnsupportedError(
            "JWT without PyJWT", ("pip install 'oxillama-torch[jwt]'",)
        ) from None
    return jwt
