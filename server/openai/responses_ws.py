"""OpenAI's WebSocket mode: ``GET /v1/responses`` with an upgrade.

In: ``{"type": "response.create", ...}`` with the fields of the route, without ``stream`` and
``background``; ``stream_id`` names a lane, ``generate: false`` only reads the prompt. Out: the
events of the stream, with the lane's ``stream_id``. Lanes go on side by side; within one lane
responses follow each other. What is not stored can be built upon within the connection.
"""

from __future__ import annotations

import collections
import logging
import threading
from collections import OrderedDict
from typing import Any

import orjson
import pydantic
from flask import Blueprint, Response, current_app, g
from wsproto.frame_protocol import CloseReason

from oxillama_torch.errors import EngineError, OxiLlamaError, RequestError
from oxillama_torch.server import strict_json
from oxillama_torch.server.errors import code_of, envelope, from_validation, status_of
from oxillama_torch.server.metering import Meter
from oxillama_torch.server.pool import Services
from oxillama_torch.server.responses.create import Draft, draft, launch
from oxillama_torch.server.responses.event_log import LogStream
from oxillama_torch.server.responses.runner import ResponseJob
from oxillama_torch.server.schemas.responses import ResponseBody
from oxillama_torch.server.store.owner import act_for, current_owner
from oxillama_torch.server.websocket import Channel, serve_websocket

__all__ = ["blueprint"]

log = logging.getLogger(__name__)

_MAX_LANES = 32
_MAX_WAITING = 16
_MAX_REMEMBERED = 64

Body = dict[str, Any]


def blueprint(services: Services) -> Blueprint:
    """Responses over WebSockets."""
    routes = Blueprint("responses_ws", __name__)

    @routes.get("/v1/responses", websocket=True)
    def connect() -> Response:
        return serve_websocket(lambda channel: _Connection(services, channel).serve())

    return routes


class _Source:
    """A response in progress; a ``websocket.Source``."""

    def __init__(self, job: ResponseJob, stream_id: str | None, channel: Channel) -> None:
        assert job.log is not None, "somebody reads the events"
        self._log, self._wake = job.log, channel.wake
        self._mark = {} if stream_id is None else {"stream_id": stream_id}
        self.abort, self.cancel = job.abort, job.cancel
        self._stream = LogStream(job.log, gone=job.cancel, abort=job.abort)
        job.log.listen(self._wake)

    @property
    def ended(self) -> bool:
        return self._stream.ended

    def messages(self) -> list[dict]:
        """What can be said now."""
        messages = [{**orjson.loads(line), **self._mark} for line in self._stream.lines()]
        if self.ended:
            self._log.forget(self._wake)
        return messages


class _Lane:
    """Responses that follow each other."""

    def __init__(self) -> None:
        self.waiting: collections.deque[Body] = collections.deque()
        self.job: ResponseJob | None = None
        self.thread: threading.Thread | None = None


class _Connection:
    """The responses of one connection."""

    def __init__(self, services: Services, channel: Channel) -> None:
        self._services, self._channel = services, channel
        self._app = current_app._get_current_object()
        self._owner = current_owner()
        # Messages have accounts of their own.
        self._allowance, g.meter.allowance = g.meter.allowance, None
        self._lanes: dict[str | None, _Lane] = {}
        self._lock = threading.Lock()
        # Contexts of responses made here, by id: those that are not stored are nowhere else.
        self._remembered: OrderedDict[str, tuple[Draft, ResponseJob]] = OrderedDict()
        self._ended = False

    def serve(self) -> None:
        """Answer messages until the connection ends."""
        for message in self._channel.messages():
            if isinstance(message, bytes):
                self._refuse(RequestError("messages are text frames", code="invalid_type"), None)
                self._channel.end(CloseReason.UNSUPPORTED_DATA)
                continue
            stream_id = None
            try:
                body = strict_json.loads(message.encode())
                if not isinstance(body, dict):
                    raise RequestError("a message is a JSON object", code="invalid_type")
                stream_id = _stream_id(body)
                self._handle(body, stream_id)
            except Exception as error:
                self._refuse(error, stream_id)
        self._end()

    def _end(self) -> None:
        """Nothing more is begun; wait for the threads of lanes."""
        with self._lock:
            self._ended = True
            threads = [lane.thread for lane in self._lanes.values() if lane.thread is not None]
            jobs = [lane.job for lane in self._lanes.values() if lane.job is not None]
        for job in jobs:
            job.cancel()
        for thread in threads:
            thread.join()

    def _refuse(self, error: Exception, stream_id: str | None) -> None:
        if isinstance(error, pydantic.ValidationError):
            error = from_validation(error)
        if not isinstance(error, OxiLlamaError):
            log.error("a message over a WebSocket failed", exc_info=error)
        self._app.extensions["metrics"].error(code_of(error))
        mark = {} if stream_id is None else {"stream_id": stream_id}
        self._channel.send({"type": "error", "status": status_of(error), **envelope(error), **mark})

    def _handle(self, body: Body, stream_id: str | None) -> None:
        kind = body.pop("type", None)
        if kind == "response.create":
            self._create(body, stream_id)
        elif kind == "response.steer":
            self._channel.send(_no_steering(body, stream_id))
        else:
            raise RequestError(f"unknown type {str(kind)[:64]!r}", param="type")

    def _create(self, body: Body, stream_id: str | None) -> None:
        for name in ("stream", "background"):
            if body.pop(name, None) not in (None, name == "stream"):
                raise RequestError(
                    f"{name!r} is not supported over a WebSocket.",
                    code="unsupported_parameter",
                    param=name,
                )
        if self._channel.draining:
            raise EngineError("the server is shutting down")
        with self._lock:
            lane = self._lane(stream_id)
            busy = lane.thread is not None or (lane.job is not None and not lane.job.done.is_set())
            if busy:
                self._queue(lane, body, stream_id)
        if not busy:
            self._begin(lane, body, stream_id)

    def _lane(self, stream_id: str | None) -> _Lane:
        lane = self._lanes.get(stream_id)
        if lane is None:
            if len(self._lanes) >= _MAX_LANES:
                raise RequestError(f"at most {_MAX_LANES} streams", param="stream_id")
            lane = self._lanes[stream_id] = _Lane()
        return lane

    def _queue(self, lane: _Lane, body: Body, stream_id: str | None) -> None:
        """Have a body begun when those before it have ended."""
        if len(lane.waiting) >= _MAX_WAITING:
            raise RequestError(
                f"{_MAX_WAITING} responses are waiting", status=429, code="rate_limit_exceeded"
            )
        lane.waiting.append(body)
        if lane.thread is None:
            lane.thread = threading.Thread(
                target=self._work_off, args=(lane, stream_id), name="lane", daemon=True
            )
            lane.thread.start()

    def _work_off(self, lane: _Lane, stream_id: str | None) -> None:
        act_for(self._owner)
        with self._app.app_context():
            while True:
                if lane.job is not None:
                    lane.job.done.wait()
                with self._lock:
                    if self._ended or not lane.waiting:
                        lane.thread = None
                        return
                    body = lane.waiting.popleft()
                try:
                    self._begin(lane, body, stream_id)
                except Exception as error:
                    self._refuse(error, stream_id)

    def _begin(self, lane: _Lane, body: Body, stream_id: str | None) -> None:
        """Start a response, in an account of its own."""
        if self._allowance is not None:
            self._allowance.admit()
        warm = body.pop("generate", None) is False
        parsed = ResponseBody.parse(body)
        before = None
        with self._lock:
            remembered = self._remembered.get(parsed.previous_response_id or "")
        if remembered is not None:
            before = _context(*remembered)
        connection, g.meter = (
            g.get("meter"),
            Meter(self._app.extensions["metrics"], self._allowance),
        )
        try:
            with self._services.lease(parsed.model) as found:
                made = draft(parsed, found, self._app.extensions["store"], before)
                job = launch(made, self._app.extensions["store"], streamed=True, warm=warm)
        finally:
            g.meter = connection
        with self._lock:
            lane.job = job
            self._remembered[job.id] = (made, job)
            while len(self._remembered) > _MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        self._app.extensions["responses"].start(job)
        self._channel.add(_Source(job, stream_id, self._channel))
        if self._ended:
            job.cancel()


def _context(made: Draft, job: ResponseJob) -> list[dict[str, Any]]:
    """What a response that was made here leaves for the next."""
    if not job.done.is_set():
        raise RequestError(
            f"Response '{job.id}' is still in progress.", param="previous_response_id"
        )
    return [*made.before, *made.items, *job.builder.response["output"]]


def _stream_id(body: Body) -> str | None:
    """The lane that a message is for."""
    given = body.pop("stream_id", None)
    if given is not None and (not isinstance(given, str) or len(given) > 256):
        raise RequestError("a text of at most 256 characters", param="stream_id")
    return given


def _no_steering(body: Body, stream_id: str | None) -> dict[str, Any]:
    steer = {name: body.get(name) for name in ("input", "previous_response_id")}
    error = {
        "type": "invalid_request_error",
        "code": "steering_not_supported",
        "message": "A response cannot be steered once it has begun.",
    }
    mark = {} if stream_id is None else {"stream_id": stream_id}
    failed = {"type": "response.steer.failed", "sequence_number": 0}
    return {**failed, "error": error, "steer": steer, **mark}
