"""Setting runs going: new ones, and those whose calls the client has answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import orjson
from flask import Response, current_app, g, jsonify
from sqlalchemy.orm import Session

from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.server.answer import stream_frames
from oxillama_torch.server.assistants.builder import Event, RunBuilder
from oxillama_torch.server.assistants.job import DONE, RunJob, RunStream, frame, last_error_of
from oxillama_torch.server.assistants.objects import Object, new_run
from oxillama_torch.server.assistants.records import (
    NO_TOKENS,
    add,
    add_run,
    expire_runs,
    find_run,
    history,
    new_messages,
    require_idle,
    save,
    write_messages,
)
from oxillama_torch.server.assistants.turns import ThreadTooLong, begin_turn
from oxillama_torch.server.metering import Meter
from oxillama_torch.server.output import Generation
from oxillama_torch.server.pool import Services
from oxillama_torch.server.responses.event_log import EventLog
from oxillama_torch.server.schemas.assistants import MessageBody, RunBody, ToolOutputsBody
from oxillama_torch.server.store.paging import fetch
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables_assistants import AssistantRow, RunRow, ThreadRow

__all__ = ["answer_run", "create_run"]


def create_run(
    services: Services,
    body: RunBody,
    thread_id: str,
    thread: Object | None = None,
    bodies: Sequence[MessageBody] = (),
) -> Response:
    """Start a run, on a thread that is there or on a new one with messages."""
    store = _store()
    expire_runs(store)
    messages = new_messages(thread_id, [*bodies, *(body.additional_messages or ())])
    with store.read() as session:
        objects = messages
        if thread is None:
            require_idle(session, thread_id, "Can't run")
            objects = history(session, thread_id) + messages
        assistant = None
        if body.assistant_id is not None:
            assistant = fetch(session, AssistantRow, body.assistant_id, "assistant").data
    queued = new_run(thread_id, body.fields(assistant))
    builder = RunBuilder(_copy(queued), dict(NO_TOKENS))
    generation = _generation(services, builder, objects)
    first: list[Event] = [] if thread is None else [("thread.created", thread)]
    first.append(("thread.run.created", queued))

    def write(session: Session) -> None:
        if thread is not None:
            add(session, ThreadRow, thread)
        else:
            require_idle(session, thread_id, "Can't run")
        write_messages(session, messages)
        add_run(session, queued)

    return _run(builder, generation, first, write, stream=bool(body.stream))


def answer_run(services: Services, body: ToolOutputsBody, thread_id: str, run_id: str) -> Response:
    """Go on with a run whose calls the client has answered."""
    store = _store()
    expire_runs(store)
    with store.read() as session:
        row = find_run(session, thread_id, run_id)
        _check_waiting(row)
        objects = history(session, thread_id)
    builder = RunBuilder(_copy(row.data), dict(row.usage))
    asked = row.data["required_action"]["submit_tool_outputs"]["tool_calls"]
    outputs = body.by_call([call["id"] for call in asked])
    step = next(
        item for item in objects if item.get("run_id") == run_id and item["status"] == "in_progress"
    )
    first = list(builder.answered(step, outputs))
    builder.run.update(status="queued", required_action=None)
    generation = _generation(services, builder, objects, again=True)

    def write(session: Session) -> None:
        _check_waiting(find_run(session, thread_id, run_id))
        save(session, _copy(builder.changed), dict(builder.usage))

    return _run(builder, generation, first, write, stream=bool(body.stream))


def _generation(
    services: Services, builder: RunBuilder, objects: list[Object], *, again: bool = False
) -> Generation | list[Event]:
    """The generation of a run's next turn, or the events of its end where it cannot go on.

    Raises:
        as ``begin_turn``, except ``again``: what is wrong with a run that exists is its failure.
    """
    try:
        service, adapters = services.find(builder.run["model"])
        generation = begin_turn(service, adapters, builder.run, objects, builder.usage)
    except ThreadTooLong:
        return list(builder.too_long())
    except (RequestError, UnsupportedError) as error:
        if not again or isinstance(error, RequestError) and error.status >= 500:
            raise
        return list(builder.end("failed", last_error_of(error)))
    # A run goes on when the request that asked for it has been answered.
    generation.meter = Meter(current_app.extensions["metrics"], g.get("allowance"))
    return generation


def _run(
    builder: RunBuilder,
    generation: Generation | list[Event],
    first: list[Event],
    write: Callable[[Session], None],
    *,
    stream: bool,
) -> Response:
    """Acknowledge a run, set it going, and answer with it or with its events."""
    store, log = _store(), EventLog(keep=False) if stream else None
    try:
        store.write(write)
    except BaseException:
        if isinstance(generation, Generation):
            generation.cancel()
        raise
    snapshot, job = _copy(builder.run), None
    if isinstance(generation, Generation):
        job = RunJob(builder, generation, store, first, log)
        current_app.extensions["runs"].start(job)
    else:
        store.write(lambda session: save(session, _copy(builder.changed), dict(builder.usage)))
        if log is not None:
            for event in (*first, *generation):
                log.append(frame(*event))
            log.append(DONE)
            log.close()
    if log is None:
        return jsonify(snapshot)
    return _streamed(log, job)


def _streamed(log: EventLog, job: RunJob | None) -> Response:
    """The events of a run; a client that leaves does not end it, it may ask for it later."""

    def nothing(*_: object) -> None:
        pass

    try:
        abort = nothing if job is None else job.abort
        return stream_frames(RunStream(log, gone=nothing, abort=abort))
    except RequestError:
        # No room for a stream: whoever tries again must find the thread free.
        if job is not None:
            job.cancel()
        raise


def _check_waiting(row: RunRow) -> None:
    if row.status != "requires_action":
        raise RequestError(f"Runs in status '{row.status}' do not accept tool outputs.")


def _copy(data: Any) -> Any:
    return orjson.loads(orjson.dumps(data))


def _store() -> Store:
    return current_app.extensions["store"]
