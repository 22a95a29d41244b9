"""``/v1/files``: upload, list, get, content, delete."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Literal

from flask import Blueprint, Response, current_app, jsonify, request
from pydantic import BaseModel

from oxillama_torch.errors import RequestError
from oxillama_torch.server import strict_json
from oxillama_torch.server.listing import as_list, list_query
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.batches import ExpiresAfter
from oxillama_torch.server.store.files import add_file, delete_file, expire_files, find_file
from oxillama_torch.server.store.paging import page
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.store.tables_files import FileRow
from oxillama_torch.server.upload import receive

__all__ = ["blueprint", "send_blob"]

MOST_UPLOADS = 16
_MOST_LISTED = 10_000
# Names and fields around a file of the largest size allowed.
_FORM_BYTES = 1024 * 1024

Blob = tuple[str, str, int]


class _UploadForm(BaseModel):
    purpose: Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
    expires_after: ExpiresAfter | None = None

    def lifetime_s(self) -> int | None:
        return None if self.expires_after is None else self.expires_after.seconds


def blueprint(services: Services) -> Blueprint:
    """Routes of files."""
    routes = Blueprint("files", __name__)
    # Each holds a thread for as long as its client takes to send.
    uploads = threading.BoundedSemaphore(MOST_UPLOADS)

    @routes.post("/v1/files")
    def upload() -> Response:
        if not uploads.acquire(blocking=False):
            raise RequestError(
                f"{MOST_UPLOADS} files are being uploaded; there is no room for another",
                status=503,
                code="overloaded",
                type="server_error",
            )
        try:
            return jsonify(_upload(services.config.max_file_bytes))
        finally:
            uploads.release()

    _add_reading(routes)
    return routes


def _add_reading(routes: Blueprint) -> None:
    @routes.get("/v1/files")
    def list_files() -> Response:
        store = _store()
        expire_files(store)
        purpose = request.args.get("purpose")
        filters = {} if purpose is None else {"purpose": purpose}
        with store.read() as session:
            query = list_query(_MOST_LISTED, _MOST_LISTED)
            return jsonify(as_list(*page(session, FileRow, **query, **filters)))

    @routes.get("/v1/files/<file_id>")
    def get(file_id: str) -> Response:
        return jsonify(_find(file_id).data)

    @routes.get("/v1/files/<file_id>/content")
    def content(file_id: str) -> Response:
        return send_blob(_find(file_id), "application/octet-stream")

    @routes.delete("/v1/files/<file_id>")
    def delete(file_id: str) -> Response:
        delete_file(_store(), file_id)
        return jsonify({"id": file_id, "object": "file", "deleted": True})


def send_blob(row: FileRow, mimetype: str) -> Response:
    """A file's content, piece by piece."""
    content = _store().blobs.open(row.blob)

    def pieces() -> Iterator[bytes]:
        with content:
            while piece := content.read(64 * 1024):
                yield piece

    response = Response(pieces(), mimetype=mimetype)
    # Not in the generator alone: one that was never started runs no clean-up.
    response.call_on_close(content.close)
    response.content_length = row.data["bytes"]
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _store() -> Store:
    return current_app.extensions["store"]


def _find(file_id: str) -> FileRow:
    store = _store()
    expire_files(store)
    with store.read() as session:
        return find_file(session, file_id)


def _upload(max_bytes: int) -> dict:
    store, kept = _store(), []
    expire_files(store)
    try:
        return _add(store, _receive(store, max_bytes, kept), kept)
    except BaseException:
        for _, blob, _ in kept:
            store.blobs.delete(blob)
        raise


def _receive(store: Store, max_bytes: int, kept: list[Blob]) -> _UploadForm:
    """Read the body; what was kept of it is in ``kept`` even when something is wrong with it."""

    def keep(filename: str, stream: Any) -> None:
        kept.append((filename, *store.blobs.put(stream, max_bytes)))

    fields, files = receive(request, max_bytes + _FORM_BYTES, keep)
    if "file" not in files or len(files) != 1:
        raise RequestError(
            "one 'file' must be uploaded", code="missing_required_parameter", param="file"
        )
    return _UploadForm.model_validate(_nested(fields))


def _nested(fields: dict[str, str]) -> dict[str, Any]:
    """``a[b]`` as forms write it becomes ``{"a": {"b": ...}}``; so does JSON."""
    found: dict[str, Any] = {name: value for name, value in fields.items() if "[" not in name}
    for name, value in fields.items():
        outer, bracket, inner = name.removesuffix("]").partition("[")
        if bracket and isinstance(group := found.setdefault(outer, {}), dict):
            group[inner] = value
    if isinstance(after := found.get("expires_after"), str) and after.startswith("{"):
        found["expires_after"] = strict_json.loads(after.encode())
    return found


def _add(store: Store, form: _UploadForm, kept: list[Blob]) -> dict:
    [(filename, blob, nbytes)] = kept
    lifetime_s = form.lifetime_s()
    row = store.write(
        lambda session: add_file(
            session,
            blob,
            nbytes,
            filename=_plain_name(filename),
            purpose=form.purpose,
            lifetime_s=lifetime_s,
        )
    )
    return row.data


def _plain_name(filename: str) -> str:
    """The last part of a path, without what does not print: it is a label and nothing more."""
    name = filename.replace("\\", "/").rpartition("/")[2]
    return "".join(c for c in name if c.isprintable())[:255] or "file"
