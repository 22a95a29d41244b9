"""Texts, tokens, vectors: ``/tokenize``, ``/detokenize``, ``/apply-template``, ``/embedding``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import orjson
from flask import Blueprint, Response, jsonify

from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.server.answer import answer, deadline_of
from oxillama_torch.server.embedding import Embedded, Embedding
from oxillama_torch.server.http import json_body
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.native import (
    ApplyTemplateBody,
    DetokenizeBody,
    NativeEmbeddingBody,
    TokenizeBody,
)
from oxillama_torch.server.service import Service
from oxillama_torch.tokenizer.chat_template import ChatTemplate

__all__ = ["blueprint"]


def blueprint(services: Services) -> Blueprint:
    """Routes of texts and tokens."""
    routes = Blueprint("native_text", __name__)

    def service_of(model: str | None) -> Service:
        return services.find(model or services.default.model_id)[0]

    @routes.post("/tokenize")
    def tokenize() -> Response:
        body = TokenizeBody.model_validate(json_body())
        # Millions of tokens: Python's own encoder would hold up every thread.
        found = orjson.dumps(_tokenize(service_of(body.model), body))
        return Response(found, mimetype="application/json")

    @routes.post("/detokenize")
    def detokenize() -> Response:
        body = DetokenizeBody.model_validate(json_body())
        tokenizer = service_of(body.model).tokenizer
        if not all(0 <= token_id < tokenizer.vocab_size for token_id in body.tokens):
            raise RequestError("token id out of range", param="tokens")
        text = tokenizer.decode(body.tokens)
        return jsonify({"content": text, "prompt": text})

    @routes.post("/apply-template")
    def apply_template() -> Response:
        body = ApplyTemplateBody.model_validate(json_body())
        text = _template(service_of(body.model)).render(
            [message.for_template() for message in body.messages],
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            **(body.chat_template_kwargs or {}),
        )
        return jsonify({"prompt": text})

    @routes.post("/embedding")
    @routes.post("/embeddings")
    def embed() -> Response:
        body = NativeEmbeddingBody.model_validate(json_body())
        service = service_of(body.model)
        pooling = body.engine_pooling(service.engine.pooling)
        embedding = Embedding(service, body.prompts(service), pooling, deadline_of(service))
        form = _EmbeddingForm(body.embd_normalize, pooling is not None)
        return answer(embedding, form, stream=False, ignored=[])

    @routes.get("/tokenizer_info")
    def tokenizer_info() -> Response:
        tokenizer, template = services.default.tokenizer, services.default.template

        def text(token_id: int | None) -> str | None:
            if token_id is None:
                return None
            return tokenizer.token_bytes(token_id).decode(errors="replace")

        return jsonify(
            {
                "bos_token": text(tokenizer.bos_id),
                "eos_token": text(tokenizer.eos_id),
                "vocab_size": tokenizer.vocab_size,
                "chat_template": template.source if template else None,
            }
        )

    return routes


def _template(service: Service) -> ChatTemplate:
    if service.template is None:
        raise UnsupportedError("chat with a model whose file has no chat template")
    return service.template


def _tokenize(service: Service, body: TokenizeBody) -> dict:
    tokenizer = service.tokenizer
    if body.content is not None:
        ids = tokenizer.encode(
            body.content, add_special=body.add_special, parse_special=body.parse_special
        )
        return {"tokens": [_piece(service, i) for i in ids] if body.with_pieces else ids}
    if body.messages is not None:
        ids = _template(service).render_ids(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
        )
    elif body.prompt is not None:
        ids = tokenizer.encode(body.prompt, add_special=body.add_special_tokens)
    else:
        return {"tokens": []}  # as llama-server answers to nothing
    return {"count": len(ids), "max_model_len": service.engine.max_context, "tokens": ids}


def _piece(service: Service, token_id: int) -> dict:
    """A token's text, or its bytes where they are no UTF-8 on their own."""
    data = service.tokenizer.token_bytes(token_id)
    try:
        return {"id": token_id, "piece": data.decode("utf-8")}
    except UnicodeDecodeError:
        return {"id": token_id, "piece": list(data)}


class _EmbeddingForm:
    """Embeddings in llama-server's shape: a list of rows per input, one row with pooling.

    Args:
        order: of the norm that rows are divided by: -1 none, 0 the largest becomes 32760, else p.
        pooled: rows of all tokens are left as they are.
    """

    def __init__(self, order: int, pooled: bool) -> None:
        self._order, self._pooled = order, pooled

    def whole(self, outputs: Iterator[Embedded]) -> Response:
        """The answer."""
        rows = {output.index: output.rows for output in outputs}
        return jsonify(
            [
                {"index": index, "embedding": self._scaled(rows[index]).tolist()}
                for index in range(len(rows))
            ]
        )

    def _scaled(self, rows: np.ndarray) -> np.ndarray:
        if self._order < 0 or not self._pooled:
            return rows
        wide = rows.astype(np.float64)
        order = np.inf if self._order == 0 else self._order
        # Divided first: powers of a high order would overflow.
        largest = np.maximum(np.abs(wide).max(-1, keepdims=True), np.finfo(np.float32).tiny)
        length = largest * np.linalg.norm(wide / largest, ord=order, axis=-1, keepdims=True)
        if self._order == 0:
            length = length / 32760
        return (wide / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)
