"""Unprefixed routes: health, statistics, tokenizing."""

from __future__ import annotations

from flask import Blueprint, Response, current_app, jsonify
from prometheus_client import CONTENT_TYPE_LATEST

from oxillama_torch import __version__
from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.server.http import json_body
from oxillama_torch.server.metrics import Metrics
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.native import DetokenizeBody, TokenizeBody
from oxillama_torch.server.service import Service

__all__ = ["blueprint"]


def blueprint(services: Services) -> Blueprint:
    """Routes of llama-server's dialect."""
    service = services.default
    routes = Blueprint("native", __name__)

    @routes.get("/health")
    @routes.get("/v1/health")
    def health() -> tuple[Response, int]:
        if not all(service.engine.alive for service in services.ready()):
            return jsonify({"status": "error", "version": __version__}), 503
        return jsonify({"status": "ok", "version": __version__}), 200

    @routes.get("/ready")
    def ready() -> tuple[Response, int]:
        if current_app.extensions["lifecycle"].draining:
            return jsonify({"status": "draining"}), 503
        if not services.default.engine.alive:
            return jsonify({"status": "error"}), 503
        return jsonify({"status": "ready"}), 200

    @routes.get("/metrics")
    def metrics() -> Response:
        found: Metrics = current_app.extensions["metrics"]
        response = Response(found.exposition(), content_type=CONTENT_TYPE_LATEST)
        response.headers["Process-Start-Time-Unix"] = str(int(found.started_at))
        return response

    @routes.get("/stats")
    def stats() -> Response:
        return jsonify(service.engine.stats())

    @routes.post("/tokenize")
    def tokenize() -> Response:
        return jsonify(_tokenize(service, TokenizeBody.model_validate(json_body())))

    @routes.post("/detokenize")
    def detokenize() -> Response:
        ids = DetokenizeBody.model_validate(json_body()).tokens
        if not all(0 <= token_id < service.tokenizer.vocab_size for token_id in ids):
            raise RequestError("token id out of range", param="tokens")
        text = service.tokenizer.decode(ids)
        return jsonify({"content": text, "prompt": text})

    @routes.get("/tokenizer_info")
    def tokenizer_info() -> Response:
        tokenizer = service.tokenizer

        def text(token_id: int | None) -> str | None:
            return None if token_id is None else tokenizer.token_bytes(token_id).decode()

        return jsonify(
            {
                "bos_token": text(tokenizer.bos_id),
                "eos_token": text(tokenizer.eos_id),
                "vocab_size": tokenizer.vocab_size,
                "chat_template": service.template.source if service.template else None,
            }
        )

    return routes


def _tokenize(service: Service, body: TokenizeBody) -> dict:
    tokenizer = service.tokenizer
    if body.content is not None:
        ids = tokenizer.encode(
            body.content, add_special=body.add_special, parse_special=body.parse_special
        )
        return {"tokens": [_piece(service, i) for i in ids] if body.with_pieces else ids}
    if body.messages is not None:
        if service.template is None:
            raise UnsupportedError("chat with a model whose file has no chat template")
        ids = service.template.render_ids(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
        )
    elif body.prompt is not None:
        ids = tokenizer.encode(body.prompt, add_special=body.add_special_tokens)
    else:
        raise RequestError(
            "one of 'content', 'prompt' and 'messages' is needed",
            code="missing_required_parameter",
            param="content",
        )
    return {"count": len(ids), "max_model_len": service.engine.max_context, "tokens": ids}


def _piece(service: Service, token_id: int) -> dict:
    """A token's text, or its bytes where they are no UTF-8 on their own."""
    data = service.tokenizer.token_bytes(token_id)
    try:
        return {"id": token_id, "piece": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"id": token_id, "piece": list(data)}
