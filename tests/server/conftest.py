"""The demo model behind the app, once per file: other tests count threads and processes."""

import private_postgres
import pytest

from oxillama_torch.config import ServerConfig
from oxillama_torch.llm import LLM
from oxillama_torch.server.app import close_app, create_app


@pytest.fixture(scope="module")
def llm():
    with LLM(max_batch_size=32, device="cpu") as llm:
        yield llm


@pytest.fixture
def make_app(llm):
    """Apps over the shared engine, each with its own settings."""
    apps = []

    def make(**settings):
        app = create_app(ServerConfig(**settings), llm)
        apps.append(app)
        return app

    yield make
    for app in apps:
        close_app(app)


@pytest.fixture
def client(make_app):
    return make_app().test_client()


@pytest.fixture
def model_id(client):
    return client.get("/v1/models").get_json()["data"][0]["id"]


@pytest.fixture(scope="session")
def postgres():
    if reason := private_postgres.missing():
        pytest.skip(reason)
    postgres = private_postgres.PrivatePostgres()
    yield postgres
    postgres.close()


@pytest.fixture
def new_store(request, tmp_path):
    """Server settings for an empty store of a kind; the same ones open it again."""

    def new(kind):
        if kind == "sqlite":
            return {"store": str(tmp_path / "store.db")}
        url = request.getfixturevalue("postgres").database()
        return {"store": url, "blobs": tmp_path / "blobs"}

    return new


@pytest.fixture(params=["sqlite", "postgresql"])
def store_settings(request, new_store):
    """Settings for an empty store, of each kind."""
    return new_store(request.param)
