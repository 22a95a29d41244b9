"""``POST /completion`` and ``/completions``: llama-server's own completions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from flask import Blueprint, Response, g, jsonify

from oxillama_torch.engine.request import TokenLogprobs
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server import sse
from oxillama_torch.server.answer import answer, deadline_of, stream_frames
from oxillama_torch.server.errors import llama_envelope
from oxillama_torch.server.event_stream import EventStream
from oxillama_torch.server.http import json_body, name_ignored
from oxillama_torch.server.native.lora_adapters import AdapterScales
from oxillama_torch.server.openai.logprobs import chat_logprob
from oxillama_torch.server.output import Finished, Generation, Output, Piece, Started
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.native_completion import NativeCompletionBody
from oxillama_torch.server.service import Service

__all__ = ["blueprint", "settings"]


def blueprint(services: Services, scales: AdapterScales) -> Blueprint:
    """Routes of native completions."""
    routes = Blueprint("native_completion", __name__)

    @routes.post("/completion")
    @routes.post("/completions")
    def create() -> Response:
        body = NativeCompletionBody.model_validate(json_body())
        ignored = body.ignored_fields()
        service, adapters = services.find(body.model or services.default.model_id)
        adapters += scales.adapters(service, body.lora)
        prompts = body.prompts(service)
        params = body.sampling_params(service)
        if body.stream and len(prompts) * params.n > 1:
            raise RequestError("a stream has one prompt and one completion.", param="stream")
        generation = Generation(service, prompts, params, deadline_of(service), adapters)
        form = NativeForm(service, body, prompts, params, generation)
        if not body.stream:
            return answer(generation, form, stream=False, ignored=ignored)
        events = EventStream(generation, form, g.request_id, error_frame=_error_frame, end=b"")
        response = stream_frames(events)
        name_ignored(response, ignored)
        return response

    return routes


def _error_frame(error: Exception) -> bytes:
    return sse.frame(llama_envelope(error))


def settings(params: SamplingParams, service: Service) -> dict[str, Any]:
    """``generation_settings``: what a completion was or would be made with."""
    return {
        "seed": -1 if params.seed is None else params.seed,
        "n_predict": -1 if params.max_tokens is None else params.max_tokens,
        "temperature": params.temperature,
        "dynatemp_range": params.dynatemp_range,
        "dynatemp_exponent": params.dynatemp_exponent,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "typical_p": params.typical_p,
        "top_n_sigma": params.top_n_sigma,
        "xtc_probability": params.xtc_probability,
        "xtc_threshold": params.xtc_threshold,
        "mirostat": params.mirostat,
        "mirostat_tau": params.mirostat_tau,
        "mirostat_eta": params.mirostat_eta,
        "repeat_penalty": params.repetition_penalty,
        "repeat_last_n": params.repeat_last_n,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "dry_multiplier": params.dry_multiplier,
        "dry_base": params.dry_base,
        "dry_allowed_length": params.dry_allowed_length,
        "dry_penalty_last_n": params.dry_penalty_last_n,
        "dry_sequence_breakers": params.dry_sequence_breakers,
        "stop": params.stop,
        "ignore_eos": params.ignore_eos,
        "min_keep": params.min_keep,
        "n_probs": params.logprobs or 0,
        "samplers": params.samplers,
        "n_ctx": service.engine.max_context,
    }


@dataclass(slots=True)
class _Choice:
    """What has come of one choice so far."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    entries: list[TokenLogprobs] = field(default_factory=list)
    reason: str = "none"
    prompt_s: float = 0.0
    read_at: float | None = None
    ended_at: float | None = None

    def timings(self) -> dict[str, float | int]:
        """llama-server's figures; rates are zero where no time has passed."""
        end = self.ended_at or time.perf_counter()
        predicted_s = end - self.read_at if self.read_at is not None else 0.0
        computed, made = self.prompt_tokens - self.cached_tokens, len(self.token_ids)
        return {
            "cache_n": self.cached_tokens,
            "prompt_n": computed,
            "prompt_ms": self.prompt_s * 1e3,
            "prompt_per_token_ms": self.prompt_s * 1e3 / max(computed, 1),
            "prompt_per_second": computed / self.prompt_s if self.prompt_s else 0.0,
            "predicted_n": made,
            "predicted_ms": predicted_s * 1e3,
            "predicted_per_token_ms": predicted_s * 1e3 / max(made, 1),
            "predicted_per_second": made / predicted_s if predicted_s else 0.0,
        }


class NativeForm:
    """Outputs of one generation in llama-server's shape."""

    joins = False  # a chunk names its token

    def __init__(
        self,
        service: Service,
        body: NativeCompletionBody,
        prompts: list[list[int]],
        params: SamplingParams,
        generation: Generation,
    ) -> None:
        self._service, self._body, self._prompts = service, body, prompts
        self._params, self._generation = params, generation
        self._started = time.perf_counter()
        self._choices = [_Choice() for _ in range(len(prompts) * params.n)]

    def chunks(self, output: Output) -> Iterator[dict]:
        """The chunks of a stream that ``output`` causes."""
        choice = self._add(output)
        if isinstance(output, Piece) and (output.text or output.token_id is not None):
            chunk: dict[str, Any] = {
                "index": output.index,
                "content": output.text,
                "tokens": [] if output.token_id is None else [output.token_id],
                "stop": False,
                "id_slot": -1,
                "tokens_predicted": len(choice.token_ids),
                "tokens_evaluated": choice.prompt_tokens,
            }
            if self._body.timings_per_token:
                chunk["timings"] = choice.timings()
            if self._body.n_probs and output.logprobs is not None:
                chunk["completion_probabilities"] = self._probabilities([output.logprobs])
            yield chunk
        elif isinstance(output, Finished):
            yield self._picked({**self._whole(output.index), "content": "", "tokens": []})

    def frames(self, output: Output) -> bytes:
        """The frames of a stream that ``output`` causes."""
        return b"".join(map(sse.frame, self.chunks(output)))

    def last_chunk(self) -> None:
        """Nothing follows the end of the choice."""

    def whole(self, outputs: Iterator[Output]) -> Response:
        """The answer when it is not streamed: an object, or a list of several."""
        for output in outputs:
            self._add(output)
        answers = [self._picked(self._whole(index)) for index in range(len(self._choices))]
        return jsonify(answers[0] if len(answers) == 1 else answers)

    def _add(self, output: Output) -> _Choice:
        choice = self._choices[output.index]
        if isinstance(output, Started):
            choice.prompt_tokens, choice.cached_tokens = output.prompt_tokens, output.cached_tokens
            choice.read_at = time.perf_counter()
            choice.prompt_s = choice.read_at - self._started
        elif isinstance(output, Piece):
            choice.text += output.text
            if output.token_id is not None:
                choice.token_ids.append(output.token_id)
            if output.logprobs is not None:
                choice.entries.append(output.logprobs)
        elif isinstance(output, Finished):
            choice.reason, choice.ended_at = output.reason, time.perf_counter()
        return choice

    def _whole(self, index: int) -> dict[str, Any]:
        choice, prompt = self._choices[index], self._prompts[index // self._params.n]
        word = self._generation.choices[index].reply.stop_word
        stop_type = "limit" if choice.reason == "length" else "eos" if word is None else "word"
        answer: dict[str, Any] = {
            "index": index,
            "content": choice.text,
            "tokens": choice.token_ids if self._body.return_tokens else [],
            "id_slot": -1,
            "stop": True,
            "model": self._service.model_id,
            "tokens_predicted": len(choice.token_ids),
            "tokens_evaluated": choice.prompt_tokens,
            "generation_settings": settings(self._params, self._service),
            "prompt": self._service.tokenizer.decode(prompt),
            "has_new_line": "\n" in choice.text,
            "truncated": False,
            "stop_type": stop_type,
            "stopping_word": word or "",
            "tokens_cached": choice.prompt_tokens + max(len(choice.token_ids) - 1, 0),
            "timings": choice.timings(),
        }
        if self._body.n_probs and not self._body.stream:
            answer["completion_probabilities"] = self._probabilities(choice.entries)
        return answer

    def _probabilities(self, entries: list[TokenLogprobs]) -> list[dict]:
        return [self._with_ids(chat_logprob(e, self._service.tokenizer), e) for e in entries]

    @staticmethod
    def _with_ids(item: dict, entry: TokenLogprobs) -> dict:
        top = [
            {"id": token_id, **described}
            for (token_id, _), described in zip(entry.top, item["top_logprobs"], strict=True)
        ]
        return {"id": entry.token_id, **item, "top_logprobs": top}

    def _picked(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Only ``response_fields``, where they are given; ``a/b`` names a field of a field."""
        wanted = self._body.response_fields
        if not wanted:
            return answer
        picked = {}
        for path in wanted:
            value: Any = answer
            for part in path.split("/"):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                picked[path.rsplit("/", 1)[-1]] = value
        return picked
