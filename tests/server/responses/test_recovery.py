"""What becomes of background responses that a crash cut. Oracle: nothing is left hanging."""

import pytest
from openai.types.responses import Response
from sqlalchemy.orm import Session
from waiting import until

from oxillama_torch.config import ServerConfig
from oxillama_torch.server.app import close_app, create_app
from oxillama_torch.server.store.tables import ResponseRow


@pytest.fixture
def restart(llm, tmp_path):
    """Start the application on a store with one unfinished response."""
    settings = ServerConfig(store=str(tmp_path / "store.db"))
    apps = []

    def restart(request=None, **columns):
        app = create_app(settings, llm)
        body = {"model": "MODEL", "input": "Hello", "max_output_tokens": 5, "background": True}
        body["model"] = app.extensions["service"].model_id
        made = app.test_client().post("/v1/responses", json=body).get_json()
        until(lambda: get(app, made["id"])["status"] == "incomplete")

        def unfinish(session: Session) -> None:
            row = session.get(ResponseRow, made["id"])
            data = {"status": "queued", "output": [], "usage": None, "incomplete_details": None}
            row.status, row.data = "queued", {**row.data, **data}
            row.request = {**row.request, **(request or {})}
            for name, value in columns.items():
                setattr(row, name, value)

        app.extensions["store"].write(unfinish)
        close_app(app)
        apps.append(create_app(settings, llm))
        return apps[-1], made["id"]

    yield restart
    for app in apps:
        close_app(app)


def get(app, response_id):
    answer = app.test_client().get(f"/v1/responses/{response_id}").get_json()
    Response.model_validate(answer, strict=True)
    return answer


def test_unfinished_response_is_begun_again(restart):
    app, response_id = restart()
    until(lambda: get(app, response_id)["status"] == "incomplete")
    assert get(app, response_id)["usage"]["output_tokens"] == 5


def test_response_that_brings_the_server_down_is_given_up(restart):
    app, response_id = restart(attempts=3)
    until(lambda: get(app, response_id)["status"] == "failed")
    assert get(app, response_id)["error"]["code"] == "server_error"


@pytest.mark.parametrize(
    "request_",
    [{"model": "gone"}, {"previous_response_id": "resp_gone"}, {"lora": "gone"}, {"later": 1}],
)
def test_response_that_cannot_be_begun_again_has_failed(restart, request_):
    app, response_id = restart(request_)
    until(lambda: get(app, response_id)["status"] == "failed")
    assert get(app, response_id)["error"]["message"]


def test_cancelled_before_it_is_taken_up(restart, monkeypatch):
    monkeypatch.setattr("oxillama_torch.server.responses.recovery.Recovery.start", lambda _: None)
    app, response_id = restart()
    client = app.test_client()
    assert client.get(f"/v1/responses/{response_id}?stream=true").status_code == 503
    cancelled = client.post(f"/v1/responses/{response_id}/cancel").get_json()
    assert cancelled["status"] == get(app, response_id)["status"] == "cancelled"
