"""``POST /v1/chat/completions``: parse, submit, format."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from flask import Blueprint, Response, jsonify

from oxillama_torch.server import sse
from oxillama_torch.server.answer import answer, deadline_of
from oxillama_torch.server.http import json_body, new_id
from oxillama_torch.server.openai.logprobs import chat_logprob
from oxillama_torch.server.openai.stored_completions import keep_completion
from oxillama_torch.server.openai.usage import Usage
from oxillama_torch.server.output import (
    Finished,
    Output,
    Piece,
    Reasoning,
    Started,
    ToolCallArguments,
    ToolCallStarted,
)
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
        form = ChatForm(
            service, params.n, params.logprobs is not None, include_usage, remember=bool(body.store)
        )
        keep = keep_completion(form, body, turn.messages) if body.store else None
        return answer(generation, form, stream=body.stream, ignored=ignored, keep=keep)

    return routes


class _Choice:
    """What has come of one choice."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.reason: str | None = None
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def add(self, output: Output) -> None:
        if isinstance(output, Piece):
            self.pieces.append(output)
        elif isinstance(output, Reasoning):
            self._reasoning.append(output.text)
        elif isinstance(output, ToolCallStarted):
            function = {"name": output.name, "arguments": ""}
            self._calls.append({"id": output.id, "type": "function", "function": function})
        elif isinstance(output, ToolCallArguments):
            self._calls[output.call]["function"]["arguments"] += output.text
        elif isinstance(output, Finished):
            self.reason = output.reason

    def message(self) -> dict[str, Any]:
        """The assistant's message. Without text it has no content, if it has calls."""
        text = "".join(piece.text for piece in self.pieces)
        content = text if text or not self._calls else None
        message = {"role": "assistant", "content": content, "refusal": None, "annotations": []}
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        return message


class ChatForm:
    """Outputs of one generation in the shape of chat completions.

    Args:
        remember: also while streaming, for the whole completion afterwards.
    """

    __slots__ = (
        "_choices", "_head", "_include_usage", "_logprobs", "_remember", "_service",
        "_text_frames", "_usage", "joins",
    )  # fmt: skip

    def __init__(
        self,
        service: Service,
        n: int,
        logprobs: bool,
        include_usage: bool,
        *,
        remember: bool = False,
    ) -> None:
        self._service = service
        self._logprobs = logprobs
        self.joins = not logprobs
        self._include_usage = include_usage
        self._usage = Usage(n)
        self._remember = remember
        self._choices: dict[int, _Choice] = {}
        self._text_frames: dict[int, sse.TextFrame] = {}
        self._head = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": service.model_id,
            "system_fingerprint": service.fingerprint,
        }

    def chunks(self, output: Output) -> Iterator[dict]:
        """The chunks of a stream that ``output`` causes."""
        self._usage.add(output)
        if self._remember:
            self._add(output)
        if isinstance(output, Started):
            yield self._chunk(output.index, {"role": "assistant", "content": ""})
        elif isinstance(output, Piece) and (output.text or (self._logprobs and output.logprobs)):
            logprobs = self._content([output]) if self._logprobs else None
            yield self._chunk(output.index, {"content": output.text}, logprobs=logprobs)
        elif isinstance(output, Reasoning):
            yield self._chunk(output.index, {"reasoning_content": output.text})
        elif isinstance(output, ToolCallStarted):
            function = {"name": output.name, "arguments": ""}
            call = {"id": output.id, "type": "function", "function": function}
            yield self._chunk(output.index, {"tool_calls": [{"index": output.call, **call}]})
        elif isinstance(output, ToolCallArguments):
            call = {"index": output.call, "function": {"arguments": output.text}}
            yield self._chunk(output.index, {"tool_calls": [call]})
        elif isinstance(output, Finished):
            yield self._chunk(output.index, {}, output.reason)

    def frames(self, output: Output) -> bytes:
        """The frames of a stream that ``output`` causes."""
        if not isinstance(output, Piece) or self._logprobs:
            return b"".join(map(sse.frame, self.chunks(output)))
        if self._remember:
            self._add(output)
        return self._text_frame(output.index)(output.text) if output.text else b""

    def _text_frame(self, index: int) -> sse.TextFrame:
        """The frame of a choice's text, as ``chunks`` words it."""
        frame = self._text_frames.get(index)
        if frame is None:
            chunk = self._chunk(index, {"content": sse.TextFrame.HOLE})
            frame = self._text_frames[index] = sse.TextFrame(chunk)
        return frame

    def last_chunk(self) -> dict | None:
        """The usage chunk, when asked for."""
        if not self._include_usage:
            return None
        return {**self._chunk_head(), "choices": [], "usage": self._usage.as_dict()}

    def whole(self, outputs: Iterator[Output]) -> Response:
        """The answer when it is not streamed."""
        for output in outputs:
            self._usage.add(output)
            self._add(output)
        return jsonify(self.completion())

    def _add(self, output: Output) -> None:
        self._choices.setdefault(output.index, _Choice()).add(output)

    def completion(self) -> dict[str, Any]:
        """The completion when all outputs have come."""
        choices = [self._choice(i, self._choices[i]) for i in sorted(self._choices)]
        usage = self._usage.as_dict()
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _choice(self, index: int, choice: _Choice) -> dict:
        return {
            "index": index,
            "message": choice.message(),
            "logprobs": self._content(choice.pieces) if self._logprobs else None,
            "finish_reason": choice.reason,
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
