"""``/v1/batches``, and OxiLLaMa's names for the same under ``/v1/batch_jobs``."""

from __future__ import annotations

import io
from typing import Any

from flask import Blueprint, Response, current_app, jsonify

from oxillama_torch.errors import RequestError
from oxillama_torch.server.access import check_reach
from oxillama_torch.server.batches.records import add_batch, cancel, find_batch
from oxillama_torch.server.batches.results import outputs
from oxillama_torch.server.batches.runner import BatchRunner
from oxillama_torch.server.http import parsed
from oxillama_torch.server.internal import this_caller
from oxillama_torch.server.listing import as_list, list_query
from oxillama_torch.server.openai.files import send_blob
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.batches import BatchBody, BatchJobBody
from oxillama_torch.server.store.files import add_file, find_file
from oxillama_torch.server.store.paging import not_found, page
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables_files import BatchRow

__all__ = ["blueprint"]

_MAX_INPUT_BYTES = 200 * 1024 * 1024
_JOB_FIELDS = (
    "id",
    "object",
    "endpoint",
    "status",
    "created_at",
    "expires_at",
    "completed_at",
    "failed_at",
    "request_counts",
    "metadata",
)


def blueprint(services: Services) -> Blueprint:
    """Routes of batches."""
    routes = Blueprint("batches", __name__)

    @routes.post("/v1/batches")
    def create() -> Response:
        body = parsed(BatchBody)
        after = body.output_expires_after
        return jsonify(_create(body, None if after is None else after.seconds))

    @routes.get("/v1/batches")
    def list_batches() -> Response:
        with _store().read() as session:
            return jsonify(as_list(*page(session, BatchRow, **list_query())))

    @routes.get("/v1/batches/<batch_id>")
    def get(batch_id: str) -> Response:
        return jsonify(_find(batch_id).data)

    @routes.post("/v1/batches/<batch_id>/cancel")
    def cancel_batch(batch_id: str) -> Response:
        return jsonify(_cancel(batch_id))

    _add_jobs(routes)
    return routes


def _add_jobs(routes: Blueprint) -> None:
    """OxiLLaMa's routes: the same batches, with fewer fields."""

    @routes.post("/v1/batch_jobs")
    def create_job() -> tuple[Response, int]:
        body = parsed(BatchJobBody)
        return jsonify(_as_job(_create(body, None))), 202

    @routes.get("/v1/batch_jobs")
    def list_jobs() -> Response:
        with _store().read() as session:
            listed = as_list(*page(session, BatchRow, **list_query()))
        return jsonify({**listed, "data": [_as_job(data) for data in listed["data"]]})

    @routes.get("/v1/batch_jobs/<batch_id>")
    def get_job(batch_id: str) -> Response:
        return jsonify(_as_job(_find(batch_id).data))

    @routes.post("/v1/batch_jobs/<batch_id>/cancel")
    def cancel_job(batch_id: str) -> Response:
        return jsonify(_as_job(_cancel(batch_id)))

    @routes.get("/v1/batch_jobs/<batch_id>/output")
    def job_output(batch_id: str) -> Response:
        data = _find(batch_id).data
        with _store().read() as session:
            if data["output_file_id"] is not None:
                file = find_file(session, data["output_file_id"])
                return send_blob(file, "application/jsonl")
            done = b"".join(output for _, output in outputs(session, batch_id, failed=False))
        if not done:
            raise not_found("output of a batch", batch_id)
        return Response(done, mimetype="application/jsonl")


def _store() -> Store:
    return current_app.extensions["store"]


def _find(batch_id: str) -> BatchRow:
    with _store().read() as session:
        return find_batch(session, batch_id)


def _create(body: BatchBody | BatchJobBody, output_lifetime_s: int | None) -> dict[str, Any]:
    check_reach(body.endpoint)
    store = _store()
    runner: BatchRunner = current_app.extensions["batches"]
    window, inline = body.window(), body.inline()
    options = {"caller": this_caller(), "output_lifetime_s": output_lifetime_s}
    blob = None if inline is None else store.blobs.put(io.BytesIO(inline))

    def create(session) -> BatchRow:
        if blob is not None:
            file = add_file(session, *blob, filename="requests.jsonl", purpose="batch")
        else:
            file = find_file(session, body.input_file_id)
            _check_input(file.data)
        return add_batch(
            session,
            endpoint=body.endpoint,
            input_file_id=file.id,
            blob=file.blob,
            window=window,
            metadata=body.metadata,
            options=options,
        )

    row = store.write(create)
    runner.add(row)
    return row.data


def _check_input(file: dict[str, Any]) -> None:
    if file["purpose"] != "batch":
        raise RequestError(
            f"The purpose of the input file must be 'batch', not '{file['purpose']}'.",
            param="input_file_id",
        )
    if file["bytes"] > _MAX_INPUT_BYTES:
        raise RequestError(
            f"The input file must have at most {_MAX_INPUT_BYTES} bytes.", param="input_file_id"
        )


def _cancel(batch_id: str) -> dict[str, Any]:
    row = _store().write(lambda session: cancel(session, batch_id))
    current_app.extensions["batches"].cancel(batch_id)
    return row.data


def _as_job(data: dict[str, Any]) -> dict[str, Any]:
    return {name: data[name] for name in _JOB_FIELDS}
