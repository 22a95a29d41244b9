"""``/openapi.json``, and ``/docs``: the same for people, without anything from elsewhere."""

from __future__ import annotations

import functools

from flask import Blueprint, Flask, Response, current_app, jsonify
from jinja2 import Environment

from oxillama_torch.server.openapi.document import openapi_document
from oxillama_torch.server.pool import Services

__all__ = ["blueprint"]

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ info.title }} {{ info.version }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
summary { cursor: pointer; font-family: ui-monospace, monospace }
summary b { display: inline-block; width: 4.5rem }
details { border-top: 1px solid #8884; padding: .4rem 0 }
table { border-collapse: collapse; margin: .5rem 0 } td { padding: .1rem .8rem .1rem 0;
vertical-align: top } td:first-child { font-family: ui-monospace, monospace }
:root { color-scheme: light dark }
</style>
<h1>{{ info.title }} {{ info.version }}</h1>
<p>{{ info.description }} The same as <a href="openapi.json">openapi.json</a>.</p>
{% for tag, operations in tags.items() %}
<h2>{{ tag }}</h2>
<p>{{ operations[0].text }}</p>
{% for op in operations %}
<details><summary><b>{{ op.method }}</b>{{ op.path }}</summary>
{% if op.parameters %}<p>In the address:</p><table>
{% for p in op.parameters %}<tr><td>{{ p.name }}<td>{{ p.in }}</tr>{% endfor %}</table>{% endif %}
{% if op.fields %}<p>Body ({{ op.mimetype }}):</p><table>
{% for name, kind, required in op.fields %}<tr><td>{{ name }}<td>{{ kind }}<td>
{{- "required" if required }}</tr>{% endfor %}</table>{% endif %}
<p>Answers: {{ op.answers }}</p>
</details>
{% endfor %}
{% endfor %}
</html>
"""
_HEADERS = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


def blueprint(services: Services) -> Blueprint:
    """Routes of the description."""
    routes = Blueprint("openapi", __name__)

    @functools.cache
    def document(app: Flask) -> dict:
        return openapi_document(app)

    @routes.get("/openapi.json")
    def openapi() -> Response:
        return jsonify(document(current_app._get_current_object()))

    @routes.get("/docs")
    def docs() -> Response:
        page = _render(document(current_app._get_current_object()))
        return Response(page, mimetype="text/html", headers=_HEADERS)

    return routes


def _render(document: dict) -> str:
    tags: dict[str, list[dict]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            shown = _shown(document, method.upper(), path, operation)
            tags.setdefault(operation["tags"][0], []).append(shown)
    template = Environment(autoescape=True).from_string(_PAGE)
    return template.render(info=document["info"], tags=tags)


def _shown(document: dict, method: str, path: str, operation: dict) -> dict:
    content = operation.get("requestBody", {}).get("content", {})
    mimetype, media = next(iter(content.items()), ("", {}))
    schema = _resolved(document, media.get("schema", {}))
    required = schema.get("required", ())
    answers = [
        f"{status} {', '.join(response['content'])}"
        for status, response in operation["responses"].items()
    ]
    return {
        "method": method,
        "path": path,
        "text": operation["description"],
        "parameters": operation["parameters"],
        "mimetype": mimetype,
        "fields": [
            (name, _kind(field), name in required)
            for name, field in schema.get("properties", {}).items()
        ],
        "answers": "; ".join(answers),
    }


def _resolved(document: dict, schema: dict) -> dict:
    if "$ref" not in schema:
        return schema
    return document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]


def _kind(schema: dict) -> str:
    """A field's type in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[-1]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return " or ".join(dict.fromkeys(_kind(member) for member in schema[key]))
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    bounds = [f"{word} {schema[key]}" for key, word in (("minimum", "from"), ("maximum", "to"))
              if key in schema]  # fmt: skip
    return " ".join([str(kind), *bounds])
