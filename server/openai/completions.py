"""``POST /v1/completions``: parse, submit, format."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from flask import Blueprint, Response, jsonify

from oxillama_torch.engine.request import TokenLogprobs
from oxillama_torch.search import begin, mean_logprob
from oxillama_torch.server import sse
from oxillama_torch.server.answer import answer, deadline_of
from oxillama_torch.server.beams import BeamGeneration
from oxillama_torch.server.http import json_body, new_id
from oxillama_torch.server.openai.logprobs import completion_logprobs
from oxillama_torch.server.openai.usage import Usage
from oxillama_torch.server.output import Finished, Generation, Output, Piece, Started
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.completions import CompletionBody
from oxillama_torch.server.service import Service

__all__ = ["blueprint"]


def blueprint(services: Services) -> Blueprint:
    """Routes of text completions."""
    routes = Blueprint("completions", __name__)

    @routes.post("/v1/completions")
    def create() -> Response:
        body = CompletionBody.model_validate(json_body())
        ignored = body.ignored_fields()
        service, adapters = services.find(body.model)
        adapters += body.adapters()
        body.include_usage()
        prompts = body.prompts(service)
        if body.use_beam_search:
            generation = _beams(service, body, prompts, adapters)
            form = CompletionForm(service, body, prompts, body.n or 1)
        else:
            params = body.sampling_params(service.tokenizer.vocab_size)
            generation = Generation(service, prompts, params, deadline_of(service), adapters)
            form = CompletionForm(service, body, prompts, params.n)
        return answer(generation, form, stream=body.stream, ignored=ignored)

    return routes


def _beams(
    service: Service,
    body: CompletionBody,
    prompts: list[list[int]],
    adapters: tuple[tuple[str, float], ...],
) -> BeamGeneration:
    longest = service.engine.max_context if body.max_tokens is None else body.max_tokens
    options = {**body.beam_options(longest), "adapters": adapters}
    searches = [begin(ids, service.engine, service.tokenizer, **options) for ids in prompts]
    deadline = deadline_of(service)
    return BeamGeneration(service, searches, body.n or 1, body.logprobs or 0, deadline)


@dataclass(slots=True)
class _Choice:
    """What has come of one choice so far."""

    text: str = ""
    characters: int = 0
    token_ids: list[int] = field(default_factory=list)
    entries: list[TokenLogprobs | None] = field(default_factory=list)
    generated: list[TokenLogprobs] = field(default_factory=list)
    reason: str | None = None


class CompletionForm:
    """Outputs of one generation in the shape of text completions."""

    __slots__ = (
        "_body", "_choices", "_head", "_n", "_prompts", "_text_frames", "_tokenizer", "_usage",
        "joins",
    )  # fmt: skip

    def __init__(
        self, service: Service, body: CompletionBody, prompts: list[list[int]], n: int
    ) -> None:
        self._tokenizer = service.tokenizer
        self._body = body
        self._prompts = prompts
        self._n = n
        self._usage = Usage(n)
        self._head = {
            "id": new_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.model_id,
            "system_fingerprint": service.fingerprint,
        }
        self.joins = body.logprobs is None
        self._text_frames: dict[int, sse.TextFrame] = {}
        self._choices = [_Choice() for _ in range(len(prompts) * n)]

    def chunks(self, output: Output) -> Iterator[dict]:
        """The chunks of a stream that ``output`` causes: what was added since the last one."""
        if not isinstance(output, Started | Piece | Finished):
            return
        self._add(output)
        choice = self._choices[output.index]
        if not (choice.text or choice.reason or choice.token_ids):
            return
        yield self._chunk(output.index, choice)
        self._choices[output.index] = _Choice(characters=choice.characters)

    def frames(self, output: Output) -> bytes:
        """The frames of a stream that ``output`` causes."""
        if not isinstance(output, Piece) or output.logprobs is not None:
            return b"".join(map(sse.frame, self.chunks(output)))
        return self._text_frame(output.index)(output.text) if output.text else b""

    def _text_frame(self, index: int) -> sse.TextFrame:
        """The frame of a choice's text, as ``chunks`` words it."""
        frame = self._text_frames.get(index)
        if frame is None:
            chunk = self._chunk(index, _Choice(text=sse.TextFrame.HOLE))
            frame = self._text_frames[index] = sse.TextFrame(chunk)
        return frame

    def _chunk(self, index: int, choice: _Choice) -> dict:
        chunk = {**self._head, "choices": [self._as_dict(index, choice)]}
        if self._body.include_usage():
            chunk["usage"] = None
        return chunk

    def last_chunk(self) -> dict | None:
        """The usage chunk, when asked for."""
        if not self._body.include_usage():
            return None
        return {**self._head, "choices": [], "usage": self._usage.as_dict()}

    def whole(self, outputs: Iterator[Output]) -> Response:
        """The answer when it is not streamed."""
        for output in outputs:
            self._add(output)
        choices = [self._as_dict(index, choice) for index, choice in enumerate(self._best())]
        return jsonify({**self._head, "choices": choices, "usage": self._usage.as_dict()})

    def _best(self) -> list[_Choice]:
        """All choices, or of each prompt's the ``n`` with the highest mean log-probability."""
        keep = self._body.n or 1
        if keep == self._n:
            return self._choices
        best = []
        for start in range(0, len(self._choices), self._n):
            of_prompt = self._choices[start : start + self._n]
            best += sorted(of_prompt, key=lambda choice: -mean_logprob(choice.generated))[:keep]
        return best

    def _add(self, output: Output) -> None:
        self._usage.add(output)
        if isinstance(output, Started) and self._body.echo:
            self._add_prompt(output)
        elif isinstance(output, Piece):
            choice = self._choices[output.index]
            choice.text += output.text
            if output.logprobs is not None:
                choice.token_ids.append(output.token_id)
                choice.entries.append(output.logprobs)
                choice.generated.append(output.logprobs)
        elif isinstance(output, Finished):
            self._choices[output.index].reason = output.reason

    def _add_prompt(self, output: Started) -> None:
        choice = self._choices[output.index]
        prompt = self._prompts[output.index // self._n]
        choice.text += self._tokenizer.decode(prompt)
        if output.logprobs is not None:
            choice.token_ids.extend(prompt)
            choice.entries.extend(output.logprobs)

    def _as_dict(self, index: int, choice: _Choice) -> dict:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = completion_logprobs(
                choice.token_ids, choice.entries, self._tokenizer, choice.characters
            )
            choice.characters += sum(len(token) for token in logprobs["tokens"])
        return {
            "index": index,
            "text": choice.text,
            "logprobs": logprobs,
            "finish_reason": choice.reason,
        }
