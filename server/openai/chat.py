"""``POST /v1/chat/completions``: parse, submit, format."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from flask import Blueprint, Response, jsonify

from oxillama_torch.server.answer import answer, deadline_of
from oxillama_torch.server.http import json_body, new_id
from oxillama_torch.server.openai.logprobs import chat_logprob
from oxillama_torch.server.openai.usage import Usage
from oxillama_torch.server.output import Finished, Output, Piece, Started
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.chat import ChatBody
from oxillama_torch.server.service import Service
from oxillama_torch.server.turn import start_turn

__all__ = ["blueprint"]


def blueprint(services: Services) -> Blueprint:
    """Routes of chat completions."""
    routes = Blueprint("chat", __name__)

    @routes.post("/v1/chat/completions")
    def create() -> Response:
        body = ChatBody.model_validate(json_body())
        ignored = body.ignored_fields()
        service, adapters = services.find(body.model)
        adapters += body.adapters()
        include_usage = body.include_usage()
        params = body.sampling_params(service.tokenizer.vocab_size)
        turn = body.turn(params, adapters)
        generation = start_turn(service, turn, deadline_of(service))
        form = ChatForm(service, params.n, params.logprobs is not None, include_usage)
        return answer(generation, form, stream=body.stream, ignored=ignored)

    return routes


class ChatForm:
    """Outputs of one generation in the shape of chat completions."""

    def __init__(self, service: Service, n: int, logprobs: bool, include_usage: bool) -> None:
        self._service = service
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._usage = Usage(n)
        self._head = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": service.model_id,
            "system_fingerprint": service.fingerprint,
        }

    def chunks(self, output: Output) -> Iterator[dict]:
        """The chunks of a stream that ``output`` causes."""
        self._usage.add(output)
        if isinstance(output, Started):
            yield self._chunk(output.index, {"role": "assistant", "content": ""})
        elif isinstance(output, Piece) and (output.text or (self._logprobs and output.logprobs)):
            logprobs = self._content([output]) if self._logprobs else None
            yield self._chunk(output.index, {"content": output.text}, logprobs=logprobs)
        elif isinstance(output, Finished):
            yield self._chunk(output.index, {}, output.reason)

    def last_chunk(self) -> dict | None:
        """The usage chunk, when asked for."""
        if not self._include_usage:
            return None
        return {**self._chunk_head(), "choices": [], "usage": self._usage.as_dict()}

    def whole(self, outputs: Iterator[Output]) -> Response:
        """The answer when it is not streamed."""
        pieces: dict[int, list[Piece]] = {}
        reasons: dict[int, str] = {}
        for output in outputs:
            self._usage.add(output)
            if isinstance(output, Piece):
                pieces.setdefault(output.index, []).append(output)
            elif isinstance(output, Finished):
                reasons[output.index] = output.reason
        choices = [self._choice(i, pieces.get(i, []), reasons[i]) for i in sorted(reasons)]
        usage = self._usage.as_dict()
        return jsonify(
            {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}
        )

    def _choice(self, index: int, pieces: list[Piece], reason: str) -> dict:
        text = "".join(piece.text for piece in pieces)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
            "logprobs": self._content(pieces) if self._logprobs else None,
            "finish_reason": reason,
        }

    def _content(self, pieces: list[Piece]) -> dict:
        tokenizer = self._service.tokenizer
        entries = [chat_logprob(p.logprobs, tokenizer) for p in pieces if p.logprobs is not None]
        return {"content": entries, "refusal": None}

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}

    def _chunk(self, index: int, delta: dict, reason: str | None = None, logprobs=None) -> dict:
        chunk = self._chunk_head()
        chunk["choices"] = [
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        ]
        if self._include_usage:
            chunk["usage"] = None
        return chunk
