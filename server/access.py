"""Who may do what, and how much of it: keys, web tokens, the admin token, limits, origins."""

from __future__ import annotations

import hmac
import ipaddress
import re
from hashlib import sha256
from typing import Any

from flask import Request, Response, g

from oxillama_torch.config import ServerConfig
from oxillama_torch.errors import RequestError
from oxillama_torch.server.guesses import Guesses, WrongCredential
from oxillama_torch.server.internal import CALLER
from oxillama_torch.server.keys import KeyRing, fingerprint_of
from oxillama_torch.server.limits import Limiter, Limits
from oxillama_torch.server.store.owner import SERVER, Owner, act_for
from oxillama_torch.server.web_tokens import Claims, TokenVerifier, needed_scope

__all__ = ["PUBLIC_PATHS", "Access", "check_reach"]

#: Open to everybody, also while the server drains: watchdogs have no keys.
PUBLIC_PATHS = frozenset({"/health", "/v1/health", "/ready"})
# Asking how the server is uses up nothing.
_UNLIMITED_PATHS = PUBLIC_PATHS | {"/metrics", "/openapi.json", "/docs"}
_CORS_HEADERS = "Authorization, Content-Type, X-Api-Key, X-Request-Id, Idempotency-Key, OpenAI-Beta"
_CORS_EXPOSED = "x-request-id, openai-processing-ms, retry-after"
_LOCAL_HOST = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.ASCII)
_CORS_MAX_AGE_S = "600"


class Access:
    """Judges requests before their routes do anything.

    Args:
        config: everything that concerns access; what is not set there is off.

    Raises:
        UnsupportedError: a key file that cannot be used.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._keys = KeyRing(config.api_keys, config.api_key_file)
        self._verifier = None
        if config.jwt_key is not None:
            self._verifier = TokenVerifier(config.jwt_key, config.jwt_audience, config.jwt_issuer)
        token = config.admin_token
        self._admin = None if token is None else sha256(token.encode()).digest()
        self._limiter = Limiter(Limits(config.requests_per_minute, config.tokens_per_minute))
        # Apart: a client that keeps sending an old key must not keep the administrator out.
        self._key_guesses, self._admin_guesses = Guesses(), Guesses()
        self._origins = frozenset(config.cors_origins)

    @property
    def needs_key(self) -> bool:
        """Whether requests need a credential."""
        return self._keys.in_use or self._verifier is not None

    def admit(self, request: Request) -> None:
        """Let a request pass; leaves its holder and allowance in ``flask.g``.

        From here on its thread acts for the owner that the credential stands for.

        Raises:
            RequestError: 401, 403, or 429 where there are limits.
        """
        act_for(None)
        path = request.path
        if path in PUBLIC_PATHS:
            return
        if (caller := request.environ.get(CALLER)) is not None:
            self._admit_internal(caller, path)
            return
        token = _credential(request)
        address = request.remote_addr
        if path.startswith("/admin/"):
            g.holder = self._admin_guesses.judge(
                address, token, lambda: self._administrator(request, token)
            )
            act_for(SERVER)
            return
        if not self.needs_key and self._is_smuggled(request):
            raise _forbidden("Pages of this origin may not use this server.")
        peer = f"ip:{address}"
        try:
            g.holder, limits, owner = self._key_guesses.judge(
                address, token, lambda: self._holder(request, token, peer)
            )
        except RequestError:
            # What is refused has been a request all the same.
            self._limiter.allowance(peer).admit()
            raise
        act_for(owner)
        if path not in _UNLIMITED_PATHS:
            g.allowance = self._limiter.allowance(g.holder, limits)
            g.allowance.admit()

    def _admit_internal(self, caller: dict[str, Any], path: str) -> None:
        """What the server does in a caller's name has his limits and scopes, and ends with his
        key."""
        g.holder, limits = caller["holder"], None
        act_for(caller["owner"])
        g.scopes = caller.get("scopes")
        check_reach(path)
        if caller["by_key"]:
            key = self._keys.with_id(g.holder)
            if key is None:
                raise _unknown_key()
            limits = key.limits
        g.allowance = self._limiter.allowance(g.holder, limits)
        g.allowance.admit()

    def _holder(self, request: Request, token: str, peer: str) -> tuple[str, Limits | None, Owner]:
        """Who asks, what he may use up, and whose objects he reaches."""
        if (claims := self._claims(token)) is not None:
            _check_scope(claims, request)
            g.scopes = sorted(claims.scopes)
            return claims.holder, None, f"token:{claims.holder}"
        if self._keys.in_use:
            key = self._keys.find(token)
            if key is None:
                raise _unknown_key()
            g.by_key = True
            return key.id, key.limits, key.owner
        if self._verifier is not None:
            raise _unknown_key()
        return peer, None, None

    def _administrator(self, request: Request, token: str) -> str:
        """The admin token, or a web token with the scope; where there is no admin token, a peer on
        this machine. Forwarded headers say nothing."""
        digest = sha256(token.encode("utf-8", "surrogateescape")).digest()
        if self._admin is not None and hmac.compare_digest(digest, self._admin):
            return fingerprint_of(digest)
        if (claims := self._claims(token)) is not None:
            _check_scope(claims, request)
            return claims.holder
        if self._admin is not None:
            raise _unknown_key()
        if not _is_loopback(request.remote_addr or ""):
            raise _forbidden("Administration from other machines needs an admin token.")
        # A web page in a browser on this machine is not its administrator.
        host = _LOCAL_HOST.fullmatch(request.host)
        if self.is_foreign(request) or host is None:
            raise _forbidden("Administration by way of a browser needs an admin token.")
        return "local"

    def _claims(self, token: str) -> Claims | None:
        """The claims of a web token; None when it is of another kind or they are not in use."""
        # A token's first part is a JSON object in base64; a key may have dots as well.
        if self._verifier is None or token.count(".") != 2 or not token.startswith("ey"):
            return None
        return self._verifier.verify(token)

    # Other origins

    def allows_origin(self, origin: str) -> bool:
        """Whether pages from ``origin`` may use this server."""
        return origin in self._origins or "*" in self._origins

    def is_foreign(self, request: Request) -> bool:
        """Whether a browser asks on behalf of a page that is neither ours nor allowed."""
        origin = request.headers.get("Origin")
        if origin is None or self.allows_origin(origin):
            return False
        return origin.lower() != request.host_url.rstrip("/").lower()

    def _is_smuggled(self, request: Request) -> bool:
        """Whether a browser has sent this for a foreign page without asking whether it may: forms
        and bodies of no type need no preflight."""
        simple = request.method == "POST" and request.mimetype != "application/json"
        return simple and self.is_foreign(request)

    def preflight(self, request: Request) -> Response | None:
        """The answer to a browser that asks whether it may ask; None: it is no such question."""
        origin = request.headers.get("Origin")
        if (
            request.method != "OPTIONS"
            or origin is None
            or "Access-Control-Request-Method" not in request.headers
            or not self.allows_origin(origin)
        ):
            return None
        response = Response(status=204)
        response.headers["Access-Control-Allow-Methods"] = "GET, POST, PUT, DELETE"
        response.headers["Access-Control-Allow-Headers"] = _CORS_HEADERS
        response.headers["Access-Control-Max-Age"] = _CORS_MAX_AGE_S
        return response

    def dress(self, request: Request, response: Response) -> None:
        """Headers that tell the caller its limits, and a browser that it may read the answer."""
        if (allowance := g.get("allowance")) is not None:
            response.headers.update(allowance.headers())
        if self._origins:
            response.headers.add("Vary", "Origin")
            origin = request.headers.get("Origin")
            if origin is not None and self.allows_origin(origin):
                response.headers["Access-Control-Allow-Origin"] = origin
                response.headers["Access-Control-Expose-Headers"] = _CORS_EXPOSED


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _credential(request: Request) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else request.headers.get("X-Api-Key", "")


def _check_scope(claims: Claims, request: Request) -> None:
    websocket = request.headers.get("Upgrade", "").lower() == "websocket"
    needed = needed_scope(request.method, request.path, websocket)
    if needed not in claims.scopes:
        raise _missing_scope(needed)


def check_reach(path: str) -> None:
    """Refuse what the current request asks to be done later, as a POST to ``path``, when its token
    could not do it itself. Keys may do everything.

    Raises:
        RequestError: 403.
    """
    scopes, needed = g.get("scopes"), needed_scope("POST", path, False)
    if scopes is not None and needed not in scopes:
        raise _missing_scope(needed)


def _missing_scope(needed: str) -> RequestError:
    return _forbidden(f"The token does not have the scope {needed!r}.", "insufficient_scope")


def _unknown_key() -> RequestError:
    return WrongCredential("Incorrect API key provided.", "invalid_api_key")


def _forbidden(message: str, code: str = "forbidden") -> RequestError:
    return RequestError(message, status=403, code=code, type="permission_error")
