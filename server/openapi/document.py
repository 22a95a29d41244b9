"""OpenAPI 3.1 out of an application's routes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flask import Flask
from pydantic import BaseModel, TypeAdapter
from werkzeug.routing import Rule

from oxillama_torch import __version__
from oxillama_torch.server.access import PUBLIC_PATHS, Access
from oxillama_torch.server.openapi.reading import Reading, read_view, summary_of

__all__ = ["openapi_document"]

_REF = "#/components/schemas/{model}"
_PLACEHOLDER = re.compile(r"<(?:(\w+)(?:\([^)]*\))?:)?(\w+)>")
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_NATIVE_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "code": {"type": "integer"},
                "param": {"type": ["string", "null"]},
                "reason": {"type": ["string", "null"]},
            },
        }
    },
}


def openapi_document(app: Flask) -> dict[str, Any]:
    """The description of every route of ``app`` that is no WebSocket."""
    schemas: dict[str, Any] = {"Error": _ERROR, "NativeError": _NATIVE_ERROR}
    paths: dict[str, dict[str, Any]] = {}
    access: Access = app.extensions["access"]
    for rule in sorted(app.url_map.iter_rules(), key=lambda rule: rule.rule):
        if rule.websocket:
            continue
        view = app.view_functions[rule.endpoint]
        for method in sorted(rule.methods - {"HEAD", "OPTIONS"}):
            operation = _operation(rule, method, view, schemas)
            if access.needs_key and rule.rule not in PUBLIC_PATHS:
                operation["security"] = [{"bearer": []}, {"key": []}]
            paths.setdefault(_path(rule), {})[method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "oxillama-torch",
            "version": __version__,
            "description": "Routes under /v1 are OpenAI's, routes without a prefix llama-server's. "
            "GET /v1/chat/ws and GET /v1/responses are WebSockets too.",
        },
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


def _path(rule: Rule) -> str:
    return _PLACEHOLDER.sub(r"{\2}", rule.rule)


def _operation(rule: Rule, method: str, view: Callable, schemas: dict[str, Any]) -> dict[str, Any]:
    reading = read_view(view)
    blueprint, _, name = rule.endpoint.rpartition(".")
    suffix = re.sub(r"\W+", "_", _path(rule)).strip("_")
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}_{suffix}",
        "summary": name.replace("_", " "),
        "description": summary_of(view),
        "tags": [blueprint],
        "parameters": [*_path_parameters(rule), *_query_parameters(reading, schemas)],
        "responses": _responses(reading, blueprint.startswith("native")),
    }
    if (body := _request_body(reading, schemas)) is not None:
        operation["requestBody"] = body
    return operation


def _path_parameters(rule: Rule) -> Iterator[dict[str, Any]]:
    for converter, name in _PLACEHOLDER.findall(rule.rule):
        schema: dict[str, Any] = {"type": "string", "minLength": 1}
        if converter == "int":
            schema = {"type": "integer", "minimum": 0}
        yield {"name": name, "in": "path", "required": True, "schema": schema}


def _query_parameters(reading: Reading, schemas: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for model in reading.queries:
        schema = _schema_of(model, schemas, inline=True)
        for name, field in schema["properties"].items():
            if name == "limit" and reading.most is not None:
                field = {"type": "integer", "minimum": 1, "maximum": reading.most}
            required = name in schema.get("required", ())
            yield {"name": name, "in": "query", "required": required, "schema": field}
    for name in reading.parameters:
        yield {"name": name, "in": "query", "required": False, "schema": {"type": "string"}}


def _request_body(reading: Reading, schemas: dict[str, Any]) -> dict[str, Any] | None:
    if reading.form is not None:
        schema = _flattened(_schema_of(reading.form, schemas, inline=True), schemas)
        schema["dependentRequired"] = _go_together(schema["properties"])
        schema["propertyNames"] = {"minLength": 1}
        schema["properties"]["file"] = {"type": "string", "format": "binary"}
        schema.setdefault("required", []).append("file")
        return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    if not reading.bodies:
        return None
    schema = _schema_of(reading.bodies[0], schemas)
    content = {"application/json": {"schema": schema}}
    return {"required": not reading.optional_body, "content": content}


def _flattened(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Fields of a form: an object inside is written ``outer[inner]``."""
    properties: dict[str, Any] = {}
    for name, field in schema["properties"].items():
        member = next((m for m in field.get("anyOf", [field]) if "$ref" in m), None)
        if member is None:
            properties[name] = field
        else:
            inner = schemas[member["$ref"].rsplit("/", 1)[-1]]
            properties |= {f"{name}[{key}]": f for key, f in inner["properties"].items()}
    return {**schema, "properties": properties}


def _go_together(names: Iterable[str]) -> dict[str, list[str]]:
    """Of the fields ``outer[inner]`` of one object, each asks for the others."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if "[" in name:
            groups.setdefault(name.partition("[")[0], []).append(name)
    return {n: [m for m in group if m != n] for group in groups.values() for n in group}


def _responses(reading: Reading, native: bool) -> dict[str, Any]:
    content: dict[str, Any] = {mimetype: {} for mimetype in reading.mimetypes}
    if not content:
        content["application/json"] = {"schema": {"type": ["object", "array"]}}
    if reading.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = {"$ref": "#/components/schemas/" + ("NativeError" if native else "Error")}
    responses: dict[str, Any] = {
        str(status): {"description": "Success", "content": content}
        for status in sorted(reading.statuses)
    }
    responses["default"] = {
        "description": "An error",
        "content": {"application/json": {"schema": error}},
    }
    return responses


def _name_widths(node: Any) -> None:
    """Integers are those of 64 bits: JSON writes longer ones, which are read as floats."""
    if isinstance(node, dict):
        if node.get("type") == "integer" and not {"minimum", "maximum"} <= set(node):
            node["format"] = "int64"
        for value in node.values():
            _name_widths(value)
    elif isinstance(node, list):
        for value in node:
            _name_widths(value)


def _schema_of(model: Any, schemas: dict[str, Any], inline: bool = False) -> dict[str, Any]:
    """The JSON schema of a model; what it refers to goes into ``schemas``."""
    adapter = model if isinstance(model, TypeAdapter) else TypeAdapter(model)
    schema = adapter.json_schema(ref_template=_REF)
    _name_widths(schema)
    for name, definition in schema.pop("$defs", {}).items():
        if schemas.setdefault(name, definition) != definition:
            raise ValueError(f"two schemas are called {name}")
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return schema
    # Fields that exist elsewhere but have few values here, or one.
    for name, values in getattr(model, "REFUSED", {}).items():
        schema["properties"].setdefault(name, {"enum": [None, *values]})
    for name in getattr(model, "HINTS", ()):
        schema["properties"].setdefault(name, {})
    if inline:
        return schema
    schemas.setdefault(model.__name__, schema)
    return {"$ref": _REF.format(model=model.__name__)}
