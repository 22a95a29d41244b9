"""``GET /v1/chat/ws``: chat over a WebSocket, in OxiLLaMa's frames.

In: ``{"messages": [...], ...}`` with the fields of the chat route, all others optional, and an
``id`` that its answers carry; ``{"type": "cancel", "id": ...}``; ``{"type": "ping"}``.
Out: ``token`` (and ``reasoning``, ``tool_call``) with what was added, then ``done`` with
``finish_reason`` and ``usage``, or ``error``; ``pong``. The connection stays for the next request.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pydantic
from flask import Blueprint, Response, current_app, g
from wsproto.frame_protocol import CloseReason

from oxillama_torch.errors import EngineError, OxiLlamaError, RequestError
from oxillama_torch.server import strict_json
from oxillama_torch.server.answer import deadline_of
from oxillama_torch.server.errors import code_of, envelope, from_validation
from oxillama_torch.server.metering import Meter
from oxillama_torch.server.openai.logprobs import chat_logprob
from oxillama_torch.server.openai.usage import Usage
from oxillama_torch.server.output import (
    ClientGone,
    Finished,
    Generation,
    Output,
    Piece,
    Reasoning,
    ToolCallArguments,
    ToolCallStarted,
)
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.chat import ChatBody
from oxillama_torch.server.service import Service
from oxillama_torch.server.turn import start_turn
from oxillama_torch.server.websocket import Channel, serve_websocket

__all__ = ["blueprint"]

log = logging.getLogger(__name__)

_MAX_IN_PROGRESS = 16
# OxiLLaMa's, where a request says nothing.
_MAX_TOKENS, _TEMPERATURE = 512, 0.7


def blueprint(services: Services) -> Blueprint:
    """Routes of chat over WebSockets."""
    routes = Blueprint("chat_ws", __name__)

    @routes.get("/v1/chat/ws", websocket=True)
    def chat() -> Response:
        return serve_websocket(lambda channel: _Conversation(services, channel).serve())

    return routes


class _Request:
    """One request in progress; a ``websocket.Source``.

    Args:
        account: the connection's, which its tokens are added to.
    """

    def __init__(
        self,
        request_id: object,
        generation: Generation,
        service: Service,
        logprobs: bool,
        account: Meter,
    ) -> None:
        self.id, self._account = request_id, account
        self._generation, self._service, self._logprobs = generation, service, logprobs
        self._usage, self._cancelled = Usage(1), False
        self.ended = False

    def messages(self) -> list[dict]:
        """What can be said now."""
        said: list[dict] = []
        try:
            for output in self._generation.poll():
                said += map(self._marked, self._say(output))
        except ClientGone:
            self._end()
        except Exception as error:
            said.append(self._marked(self._last_words(error)))
            self._end()
        return said

    def _last_words(self, error: Exception) -> dict:
        if self._cancelled:
            return {"type": "done", "finish_reason": "cancelled", "usage": self._usage.as_dict()}
        if not isinstance(error, OxiLlamaError):
            log.exception("a request over a WebSocket failed")
        self._generation.meter.errors.append(code_of(error))
        self._generation.cancel()
        return error_message(error)

    def _say(self, output: Output) -> Iterator[dict]:
        self._usage.add(output)
        if isinstance(output, Piece) and (output.text or (self._logprobs and output.logprobs)):
            message: dict[str, Any] = {"type": "token", "delta": output.text}
            if self._logprobs and output.logprobs is not None:
                message["logprob"] = chat_logprob(output.logprobs, self._service.tokenizer)
            yield message
        elif isinstance(output, Reasoning):
            yield {"type": "reasoning", "delta": output.text}
        elif isinstance(output, ToolCallStarted):
            function = {"name": output.name, "arguments": ""}
            call = {"index": output.call, "id": output.id, "type": "function", "function": function}
            yield {"type": "tool_call", "delta": call}
        elif isinstance(output, ToolCallArguments):
            function = {"arguments": output.text}
            yield {"type": "tool_call", "delta": {"index": output.call, "function": function}}
        elif isinstance(output, Finished):
            self._end()
            usage = self._usage.as_dict()
            yield {"type": "done", "finish_reason": output.reason, "usage": usage}

    def _marked(self, message: dict) -> dict:
        return message if self.id is None else {**message, "id": self.id}

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            self._generation.meter.close()
            self._account.add(self._generation.meter)

    def stop(self) -> None:
        """The client wants no more of it; it is told when it has ended."""
        self._cancelled = True
        self._generation.cancel()

    def abort(self, error: Exception) -> None:
        self._generation.abort(error)

    def cancel(self) -> None:
        self._generation.client_gone()
        self._end()


class _Conversation:
    """The requests of one connection."""

    def __init__(self, services: Services, channel: Channel) -> None:
        self._services, self._channel = services, channel
        # Messages have accounts of their own.
        self._allowance, g.meter.allowance = g.meter.allowance, None

    def serve(self) -> None:
        """Answer messages until the connection ends."""
        for message in self._channel.messages():
            if isinstance(message, bytes):
                error = RequestError("messages are text frames", code="invalid_type")
                self._channel.send(error_message(error))
                self._channel.end(CloseReason.UNSUPPORTED_DATA)
                continue
            request_id = None
            try:
                body = strict_json.loads(message.encode())
                if not isinstance(body, dict):
                    raise RequestError("a message is a JSON object", code="invalid_type")
                request_id = _id_of(body)
                self._handle(body, request_id)
            except Exception as error:
                self._refuse(error, request_id)

    def _refuse(self, error: Exception, request_id: object) -> None:
        if isinstance(error, pydantic.ValidationError):
            error = from_validation(error)
        if not isinstance(error, OxiLlamaError):
            log.error("request %s failed", g.request_id, exc_info=error)
        current_app.extensions["metrics"].error(code_of(error))
        message = error_message(error)
        self._channel.send(message if request_id is None else {**message, "id": request_id})

    def _handle(self, body: dict, request_id: object) -> None:
        kind = body.pop("type", None)
        body.pop("id", None)
        if kind == "ping":
            self._channel.send({"type": "pong"} | ({"id": request_id} if request_id else {}))
        elif kind == "cancel":
            self._running(request_id).stop()
        elif kind in (None, "request", "chat"):
            self._start(body, request_id)
        else:
            raise RequestError(f"unknown type {kind!r}", param="type")

    def _running(self, request_id: object) -> _Request:
        for request in self._channel.in_progress:
            if isinstance(request, _Request) and request.id == request_id:
                return request
        raise RequestError(
            f"no request {request_id!r} is in progress", code="not_found", param="id"
        )

    def _start(self, body: dict, request_id: object) -> None:
        running = self._channel.in_progress
        if self._channel.draining:
            raise EngineError("the server is shutting down")
        if len(running) >= _MAX_IN_PROGRESS:
            raise RequestError(f"{_MAX_IN_PROGRESS} requests are in progress", code="overloaded")
        if any(isinstance(r, _Request) and r.id == request_id for r in running):
            raise RequestError("a request with this id is in progress", param="id")
        if self._allowance is not None:
            self._allowance.admit()
        parsed = ChatBody.model_validate({**self._defaults(body), **body, "stream": True})
        if (parsed.n or 1) != 1 or parsed.store:
            name = "store" if parsed.store else "n"
            raise RequestError(
                f"{name!r} is not supported here.", code="unsupported_parameter", param=name
            )
        parsed.ignored_fields()
        request = self._submit(parsed, request_id)
        self._channel.add(request)

    def _defaults(self, body: dict) -> dict[str, Any]:
        defaults = {"model": self._services.default.model_id, "temperature": _TEMPERATURE}
        if "max_completion_tokens" not in body:
            defaults["max_tokens"] = _MAX_TOKENS
        return defaults

    def _submit(self, body: ChatBody, request_id: object) -> _Request:
        connection, g.meter = g.meter, Meter(current_app.extensions["metrics"], self._allowance)
        try:
            with self._services.lease(body.model) as (service, adapters):
                params = body.sampling_params(service.tokenizer.vocab_size)
                turn = body.turn(params, adapters + body.adapters())
                generation = start_turn(service, turn, deadline_of(service))
        finally:
            g.meter = connection
        connection.model = service.model_id
        self._channel.follow(generation)
        return _Request(request_id, generation, service, body.logprobs is True, connection)


def error_message(error: Exception) -> dict:
    """An ``error`` frame: OxiLLaMa's message, with the code and field that other routes tell."""
    inner = envelope(error)["error"]
    return {
        "type": "error",
        "message": inner["message"],
        "code": inner["code"],
        "param": inner["param"],
    }


def _id_of(body: dict) -> str | int | None:
    """The client's name for a request."""
    given = body.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise RequestError("an id is a text or an integer", code="invalid_type", param="id")
    if isinstance(given, str) and len(given) > 256:
        raise RequestError("an id has at most 256 characters", param="id")
    return given
