"""``POST /v1/embeddings``."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
import orjson
from flask import Blueprint, Response

from oxillama_torch.errors import RequestError
from oxillama_torch.server.answer import answer, deadline_of
from oxillama_torch.server.embedding import Embedded, Embedding, unit_length
from oxillama_torch.server.http import json_body
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.embeddings import EmbeddingBody

__all__ = ["blueprint"]


def blueprint(services: Services) -> Blueprint:
    """Routes of embeddings."""
    routes = Blueprint("embeddings", __name__)

    @routes.post("/v1/embeddings")
    def create() -> Response:
        body = EmbeddingBody.model_validate(json_body())
        ignored = body.ignored_fields()
        service, adapters = services.find(body.model)
        embedding = Embedding(
            service,
            body.prompts(service.tokenizer, service.engine.max_context),
            body.engine_pooling(service.engine.pooling),
            deadline_of(service),
            adapters + body.adapters(),
        )
        form = EmbeddingForm(service.model_id, body)
        return answer(embedding, form, stream=False, ignored=ignored)

    return routes


class EmbeddingForm:
    """Embeddings in the shape of OpenAI's list."""

    def __init__(self, model: str, body: EmbeddingBody) -> None:
        self._model, self._dimensions = model, body.dimensions
        self._base64 = body.encoding_format == "base64"

    def whole(self, outputs: Iterator[Embedded]) -> Response:
        """The answer; written item by item, for all of it in one go would hold everybody up."""
        tokens, vectors = 0, {}
        for output in outputs:
            tokens += output.prompt_tokens
            vectors[output.index] = self._cut(output.rows[0])
        return Response(self._parts(vectors, tokens), mimetype="application/json")

    def _cut(self, vector: np.ndarray) -> np.ndarray:
        if self._dimensions is not None and self._dimensions > len(vector):
            raise RequestError(
                f"'dimensions' must be at most {len(vector)} with this model.", param="dimensions"
            )
        return unit_length(vector[: self._dimensions])

    def _parts(self, vectors: dict[int, np.ndarray], tokens: int) -> Iterator[bytes]:
        yield b'{"object":"list","data":['
        for index in range(len(vectors)):
            item = {
                "object": "embedding",
                "index": index,
                "embedding": self._encoded(vectors[index]),
            }
            yield (b"," if index else b"") + orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        yield b'],"model":%b,"usage":%b}' % (orjson.dumps(self._model), orjson.dumps(usage))

    def _encoded(self, vector: np.ndarray) -> np.ndarray | str:
        if not self._base64:
            return np.ascontiguousarray(vector)
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
