"""Runs of threads: created, streamed, answered, cancelled; and their steps."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, jsonify

from oxillama_torch.server.assistants.objects import new_thread
from oxillama_torch.server.assistants.records import (
    cancel_run,
    change_metadata,
    end_run,
    expire_runs,
    find_run,
    find_thread,
)
from oxillama_torch.server.assistants.start import answer_run, create_run
from oxillama_torch.server.http import parsed
from oxillama_torch.server.listing import as_list, list_query
from oxillama_torch.server.pool import Services
from oxillama_torch.server.responses.runner import ResponseRunner
from oxillama_torch.server.schemas.assistants import (
    CreateAndRunBody,
    MetadataBody,
    RunBody,
    ToolOutputsBody,
)
from oxillama_torch.server.store.paging import fetch, page
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables_assistants import RunRow, StepRow

__all__ = ["blueprint"]

_SHORT_S = 5.0


def blueprint(services: Services) -> Blueprint:
    """Routes of runs and steps."""
    routes = Blueprint("runs", __name__)
    _add_starting(routes, services)
    _add_reading(routes)
    _add_steps(routes)

    @routes.post("/v1/threads/<thread_id>/runs/<run_id>/cancel")
    def cancel(thread_id: str, run_id: str) -> Response:
        store = _store()
        expire_runs(store)
        row = store.write(lambda session: cancel_run(session, thread_id, run_id))
        data = row.data
        job = _runner().find(run_id)
        if job is not None:
            job.cancel()
        if job is None or (job.generation.finished and job.done.wait(_SHORT_S)):
            store.write(lambda session: end_run(session, run_id, "cancelled"))
        return jsonify(data)

    return routes


def _add_starting(routes: Blueprint, services: Services) -> None:
    @routes.post("/v1/threads/runs")
    def create_thread_and_run() -> Response:
        body = parsed(CreateAndRunBody)
        thread = new_thread(body.thread.metadata or {})
        return create_run(services, body, thread["id"], thread, body.thread.messages)

    @routes.post("/v1/threads/<thread_id>/runs")
    def create(thread_id: str) -> Response:
        return create_run(services, parsed(RunBody), thread_id)

    @routes.post("/v1/threads/<thread_id>/runs/<run_id>/submit_tool_outputs")
    def submit_tool_outputs(thread_id: str, run_id: str) -> Response:
        body = parsed(ToolOutputsBody)
        return answer_run(services, body, thread_id, run_id)


def _add_reading(routes: Blueprint) -> None:
    @routes.get("/v1/threads/<thread_id>/runs")
    def list_runs(thread_id: str) -> Response:
        expire_runs(_store())
        with _store().read() as session:
            find_thread(session, thread_id)
            return jsonify(as_list(*page(session, RunRow, **list_query(), thread_id=thread_id)))

    @routes.get("/v1/threads/<thread_id>/runs/<run_id>")
    def get(thread_id: str, run_id: str) -> Response:
        expire_runs(_store())
        with _store().read() as session:
            return jsonify(find_run(session, thread_id, run_id).data)

    @routes.post("/v1/threads/<thread_id>/runs/<run_id>")
    def modify(thread_id: str, run_id: str) -> Response:
        body = parsed(MetadataBody)
        with _store().read() as session:
            find_run(session, thread_id, run_id)
        job = _runner().find(run_id)
        if job is not None and body.metadata is not None:
            with job.lock:
                job.builder.run["metadata"] = body.metadata
        return jsonify(
            _store().write(
                lambda session: change_metadata(find_run(session, thread_id, run_id), body)
            )
        )


def _add_steps(routes: Blueprint) -> None:
    @routes.get("/v1/threads/<thread_id>/runs/<run_id>/steps")
    def list_steps(thread_id: str, run_id: str) -> Response:
        with _store().read() as session:
            find_run(session, thread_id, run_id)
            return jsonify(as_list(*page(session, StepRow, **list_query(), run_id=run_id)))

    @routes.get("/v1/threads/<thread_id>/runs/<run_id>/steps/<step_id>")
    def get_step(thread_id: str, run_id: str, step_id: str) -> Response:
        with _store().read() as session:
            find_run(session, thread_id, run_id)
            return jsonify(fetch(session, StepRow, step_id, "run step", run_id=run_id).data)


def _store() -> Store:
    return current_app.extensions["store"]


def _runner() -> ResponseRunner:
    return current_app.extensions["runs"]
