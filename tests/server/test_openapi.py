"""/openapi.json and /docs. Oracles: the routes themselves, and the schemas' own validator."""

import re

import pytest
from pydantic import TypeAdapter

from oxillama_torch.server.schemas.chat import ChatBody

# Routes whose body is empty.
BODILESS = re.compile(r"/cancel$|/admin/drain$")


@pytest.fixture
def document(client):
    return client.get("/openapi.json").get_json()


def operations(document):
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_every_route_is_there_and_nothing_else(client, document):
    routes = {
        (method, re.sub(r"<(?:[^:>]+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in client.application.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if not rule.websocket
    }
    assert set(operations(document)) == routes
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(ids)) == len(ids)


def test_every_reference_is_defined(document):
    def references(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    for reference in set(references(document)):
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


def test_every_route_that_takes_a_body_says_which(document):
    for (method, path), operation in operations(document).items():
        takes = method in ("POST", "PUT") and not BODILESS.search(path)
        assert ("requestBody" in operation) == takes, (method, path)
        placeholders = set(re.findall(r"{(\w+)}", path))
        found = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
        assert placeholders == found
        assert "default" in operation["responses"]


def test_bodies_are_the_models_that_validate_them(document):
    body = operations(document)["POST", "/v1/chat/completions"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/ChatBody"}
    shown = document["components"]["schemas"]["ChatBody"]
    actual = TypeAdapter(ChatBody).json_schema()
    assert set(actual["properties"]) <= set(shown["properties"])
    assert shown["required"] == actual["required"]
    # A field that is refused says what it may be.
    assert shown["properties"]["audio"] == {"enum": [None]}
    native = operations(document)["POST", "/completion"]
    assert native["responses"]["default"]["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/NativeError"
    }
    assert "text/event-stream" in native["responses"]["200"]["content"]


def test_answers_that_are_not_json_say_so(document):
    def content(method, path):
        [status] = [s for s in operations(document)[method, path]["responses"] if s != "default"]
        return status, list(operations(document)[method, path]["responses"][status]["content"])

    assert content("GET", "/metrics") == ("200", ["text/plain"])
    assert content("GET", "/docs") == ("200", ["text/html"])
    assert content("GET", "/v1/files/{file_id}/content") == ("200", ["application/octet-stream"])
    assert content("POST", "/admin/models/load") == ("202", ["application/json"])
    upload = operations(document)["POST", "/v1/files"]["requestBody"]["content"]
    form = upload["multipart/form-data"]["schema"]
    assert {"file", "purpose"} <= set(form["required"])


def test_keys_are_told(make_app):
    app = make_app(api_keys=("k",))
    answer = app.test_client().get("/openapi.json", headers={"X-Api-Key": "k"})
    found = operations(answer.get_json())
    assert found["POST", "/v1/completions"]["security"] == [{"bearer": []}, {"key": []}]
    assert "security" not in found["GET", "/health"]
    assert "security" not in operations(make_app().test_client().get("/openapi.json").get_json())[
        "POST", "/v1/completions"
    ]  # fmt: skip


def test_the_page_has_everything_and_nothing_from_elsewhere(client, document):
    response = client.get("/docs")
    page = response.get_data(as_text=True)
    for _, path in operations(document):
        assert path in page
    assert "temperature" in page
    assert not re.search(r"(src|href)=\"?(https?:)?//|<script|@import|url\(", page)
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]


def test_lists_say_how_much_they_give_at_once(client, document):
    found = operations(document)
    lists = [o for o in found.items() if any(p["name"] == "limit" for p in o[1]["parameters"])]
    assert len(lists) > 10
    for (method, path), operation in lists:
        [limit] = [p["schema"] for p in operation["parameters"] if p["name"] == "limit"]
        if method != "GET" or "{" in path:
            continue
        assert client.get(f"{path}?limit={limit['maximum']}").status_code == 200
        refused = client.get(f"{path}?limit={limit['maximum'] + 1}")
        assert refused.status_code == 400 and refused.get_json()["error"]["param"] == "limit"


@pytest.mark.parametrize(("number", "status"), [("2.0", 200), ("2e0", 200), ("2.5", 400)])
def test_integers_are_those_of_json_schema(client, model_id, number, status):
    body = f'{{"model": "{model_id}", "prompt": [5.0], "max_tokens": {number}}}'
    answer = client.post("/v1/completions", data=body, content_type="application/json")
    assert answer.status_code == status
    if status == 200:
        assert answer.get_json()["usage"]["completion_tokens"] == 2
    else:
        assert answer.get_json()["error"]["code"] == "invalid_type"


def test_items_are_described_as_they_are_read(document):
    schema = document["components"]["schemas"]["ItemsBody"]
    kinds = {m["$ref"].rsplit("/", 1)[-1] for m in schema["properties"]["items"]["items"]["anyOf"]}
    assert (
        {"_Message", "_FunctionCall", "_Reference"}
        <= kinds
        <= set(document["components"]["schemas"])
    )
    assert schema["additionalProperties"] is False
