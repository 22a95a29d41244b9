"""``/v1/responses``: create, get, list, cancel, delete, input items, token counts."""

from __future__ import annotations

import contextlib
from typing import Any

from flask import Blueprint, Response, current_app, g, jsonify, request

from oxillama_torch.errors import EngineError, RequestError
from oxillama_torch.server.answer import stream_frames, watch
from oxillama_torch.server.http import json_body, name_ignored
from oxillama_torch.server.listing import as_list, list_query
from oxillama_torch.server.metering import Meter
from oxillama_torch.server.pool import Services
from oxillama_torch.server.responses.create import Draft, count_tokens, draft, launch
from oxillama_torch.server.responses.event_log import EventLog, LogStream
from oxillama_torch.server.responses.items import items_page
from oxillama_torch.server.responses.keeping import (
    cancel_unstarted,
    delete_response,
    find_response,
    save_queued,
)
from oxillama_torch.server.responses.recovery import UNFINISHED
from oxillama_torch.server.responses.runner import ResponseJob, ResponseRunner
from oxillama_torch.server.schemas.responses import ResponseBody, StreamQuery
from oxillama_torch.server.store.paging import page
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables import ResponseRow

__all__ = ["blueprint"]

_CANCEL_TIMEOUT_S = 30.0


def blueprint(services: Services) -> Blueprint:
    """Routes of responses."""
    routes = Blueprint("responses", __name__)

    @routes.post("/v1/responses")
    def create() -> Response:
        body = ResponseBody.parse(json_body())
        made = draft(body, services.find(body.model), _store())
        if body.background:
            response = _in_background(made)
        else:
            job = launch(made, _store(), streamed=bool(body.stream))
            response = _streamed(job) if body.stream else _whole(job)
        name_ignored(response, body.without_effect())
        return response

    @routes.get("/v1/responses")
    def list_responses() -> Response:
        with _store().read() as session:
            return jsonify(as_list(*page(session, ResponseRow, **list_query())))

    @routes.post("/v1/responses/input_tokens")
    def input_tokens() -> Response:
        body = ResponseBody.parse(json_body())
        made = draft(body, services.find(body.model), _store())
        return jsonify({"object": "response.input_tokens", "input_tokens": count_tokens(made)})

    @routes.get("/v1/responses/<response_id>")
    def get(response_id: str) -> Response:
        query = StreamQuery.model_validate(request.args.to_dict())
        row = _find(response_id)
        job = _runner().find(response_id)
        if query.stream:
            return _resumed(row, job, query.starting_after)
        return jsonify(row.data if job is None else job.snapshot())

    @routes.delete("/v1/responses/<response_id>")
    def delete(response_id: str) -> Response:
        _find(response_id)
        if (job := _runner().find(response_id)) is not None:
            _cancelled(job)
        delete_response(_store(), response_id)
        return jsonify({"id": response_id, "object": "response", "deleted": True})

    @routes.post("/v1/responses/<response_id>/cancel")
    def cancel(response_id: str) -> Response:
        if not _find(response_id).data["background"]:
            raise RequestError("Cannot cancel a synchronous response.", param="response_id")
        if (job := _runner().find(response_id)) is not None:
            _cancelled(job)
        cancel_unstarted(_store(), response_id)
        return jsonify(_find(response_id).data)

    @routes.get("/v1/responses/<response_id>/input_items")
    def input_items(response_id: str) -> Response:
        return jsonify(items_page(_find(response_id).input, **list_query()))

    return routes


def _store() -> Store:
    return current_app.extensions["store"]


def _runner() -> ResponseRunner:
    return current_app.extensions["responses"]


def _find(response_id: str) -> ResponseRow:
    with _store().read() as session:
        return find_response(session, response_id)


def _whole(job: ResponseJob) -> Response:
    """The response when it has ended; an error of the generation is the request's."""
    with contextlib.ExitStack() as guard:
        guard.callback(job.generation.cancel)
        watch(guard, job.abort, job.cancel)
        _runner().start(job)
        job.done.wait()
    if job.error is not None:
        raise job.error
    return jsonify(job.builder.response)


def _streamed(job: ResponseJob) -> Response:
    """The response's events; with its client it ends too."""
    assert job.log is not None, "somebody reads the events"
    _runner().start(job)
    return stream_frames(LogStream(job.log, gone=job.cancel, abort=job.abort))


def _in_background(made: Draft) -> Response:
    """Run without a client: what is acknowledged here survives the process."""
    job = launch(made, _store(), streamed=bool(made.body.stream))
    # The request's own meter is closed with its answer.
    job.generation.meter = Meter(current_app.extensions["metrics"], g.get("allowance"))
    try:
        save_queued(_store(), made.response, made.items, made.request)
    except BaseException:
        job.generation.cancel()
        raise
    accepted = jsonify(made.response)
    _runner().start(job)
    return _resumed_live(job, None) if made.body.stream else accepted


def _resumed(row: ResponseRow, job: ResponseJob | None, starting_after: int | None) -> Response:
    """The events of a background response from some point on, whether it has ended or not."""
    if not row.data["background"]:
        raise RequestError(
            "Only the events of background responses are kept for later.", param="stream"
        )
    if job is not None:
        return _resumed_live(job, starting_after)
    with _store().read() as session:
        row = find_response(session, row.id)
        session.refresh(row, ["events"])
    if row.status in UNFINISHED:
        raise EngineError("the response is about to be taken up again")
    log = EventLog(keep=True, lines=(row.events or b"").splitlines())
    log.close()
    return _log_stream(log, starting_after)


def _resumed_live(job: ResponseJob, starting_after: int | None) -> Response:
    assert job.log is not None, "events of background responses are kept"
    return _log_stream(job.log, starting_after)


def _log_stream(log: EventLog, starting_after: int | None) -> Response:
    start = 0 if starting_after is None else starting_after + 1

    def nothing(_: Exception | None = None) -> None:
        """The response goes on without this reader."""

    return stream_frames(LogStream(log, start=start, gone=nothing, abort=nothing))


def _cancelled(job: ResponseJob) -> dict[str, Any]:
    """Cancel a job and wait until that is stored."""
    job.cancel()
    if not job.done.wait(_CANCEL_TIMEOUT_S):
        raise EngineError("the response does not end")
    return job.builder.response
