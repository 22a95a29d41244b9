"""Body of ``POST /completion``: llama-server's fields, with its defaults."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AliasChoices, Field

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.params import DRY_BREAKERS, SamplingParams
from oxillama_torch.server.schemas.common import Finite, StrictModel
from oxillama_torch.server.schemas.lists import Many, Several
from oxillama_torch.server.service import Service

__all__ = ["NativeCompletionBody"]

#: llama-server's order, and its names of steps that are called otherwise here.
_SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "xtc",
             "temperature")  # fmt: skip
_RENAMED = {"typ_p": "typical_p"}

# Fields whose other values would change the answer and are not served -> values that do not.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "adaptive_target": (-1, -1.0),
    "grammar_lazy": (False,),
    "id_slot": (-1,),
    "n_indent": (0,),
    "post_sampling_probs": (False,),
    "return_progress": (False,),
    "t_max_predict_ms": (0, -1),
    "t_max_prompt_ms": (0, -1),
}
# Fields that change no answer here: pages are shared by themselves, contexts are not shifted.
_WITHOUT_EFFECT = frozenset(
    {"cache_prompt", "n_cache_reuse", "n_discard", "n_keep", "sse_ping_interval", "user"}
)
_RANDOM_SEEDS = (-1, 2**32 - 1)

PromptPart = str | Annotated[int, Field(ge=0)]
Bias = Finite | bool
BiasPair = Annotated[list[int | str | Bias], Field(min_length=2, max_length=2)]


class ScaledAdapter(StrictModel):
    """An adapter by its place in ``GET /lora-adapters``."""

    id: Annotated[int, Field(ge=0)]
    scale: Finite


class NativeCompletionBody(StrictModel):
    prompt: str | Several[PromptPart] | Several[str | Several[PromptPart]]
    model: str | None = None
    stream: bool = False
    n_predict: Annotated[
        int, Field(ge=-1, validation_alias=AliasChoices("n_predict", "max_tokens"))
    ] = -1
    n: Annotated[int, Field(ge=1, le=128, validation_alias=AliasChoices("n", "n_cmpl"))] = 1
    return_tokens: bool = False
    timings_per_token: bool = False
    response_fields: Many[str] | None = None
    n_probs: Annotated[int, Field(ge=0, le=1024)] = 0
    temperature: Finite = 0.8
    dynatemp_range: Finite = 0.0
    dynatemp_exponent: Finite = 1.0
    top_k: int = 40
    top_p: Finite = 0.95
    min_p: Finite = 0.05
    typical_p: Finite = 1.0
    top_n_sigma: Finite = -1.0
    xtc_probability: Finite = 0.0
    xtc_threshold: Finite = 0.1
    mirostat: int = 0
    mirostat_tau: Finite = 5.0
    mirostat_eta: Finite = 0.1
    repeat_penalty: Finite = 1.0
    repeat_last_n: Annotated[int, Field(ge=-1)] = 64
    presence_penalty: Finite = 0.0
    frequency_penalty: Finite = 0.0
    dry_multiplier: Finite = 0.0
    dry_base: Finite = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: Many[str] = list(DRY_BREAKERS)
    logit_bias: Many[BiasPair] | dict[str, Bias] = []
    seed: int = -1
    stop: str | Many[str] = []
    ignore_eos: bool = False
    min_keep: Annotated[int, Field(ge=0)] = 0
    grammar: str | None = None
    json_schema: dict[str, Any] | bool | None = None
    samplers: Many[str] | None = None
    lora: Many[ScaledAdapter] | None = None

    def ignored_fields(self) -> list[str]:
        """Names of fields that nothing reads; refuses those that would change the answer."""
        ignored = []
        for name, value in (self.model_extra or {}).items():
            if name in _REFUSED and value not in (None, *_REFUSED[name]):
                raise RequestError(
                    f"{name!r} is not supported by this server.",
                    code="unsupported_parameter",
                    param=name,
                )
            if name not in _REFUSED and name not in _WITHOUT_EFFECT:
                ignored.append(name)
        return sorted(ignored)

    def prompts(self, service: Service) -> list[list[int]]:
        """Token ids of each prompt. Texts and ids may be mixed in one; spellings of special tokens
        are such tokens, as llama-server has it: prompts of this route are written by programs. An
        empty one is the beginning of a text: the begin token, or where there is none the end's."""
        given = self.prompt
        if isinstance(given, str) or any(isinstance(part, int) for part in given):
            given = [given]
        return [self._ids(item, f"prompt[{i}]", service) for i, item in enumerate(given)]

    @staticmethod
    def _ids(item: str | list[PromptPart], param: str, service: Service) -> list[int]:
        ids: list[int] = []
        tokenizer = service.tokenizer
        for index, part in enumerate([item] if isinstance(item, str) else item):
            if isinstance(part, int):
                if not 0 <= part < tokenizer.vocab_size:
                    raise RequestError(f"{part} is no token id", param=param)
                ids.append(part)
            else:
                tokenizer.check_fits(part, service.engine.max_context, param)
                ids += tokenizer.encode(part, add_special=index == 0, parse_special=True)
        if not ids:
            ids = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None][:1]
        if not ids:
            raise RequestError("a prompt must have at least one token.", param=param)
        return ids

    def sampling_params(self, service: Service) -> SamplingParams:
        """The parameters of the chain, in this engine's words."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        last_n = self.repeat_last_n
        return SamplingParams(
            max_tokens=None if self.n_predict < 0 else self.n_predict,
            n=self.n,
            temperature=max(self.temperature, 0.0),
            dynatemp_range=self.dynatemp_range,
            dynatemp_exponent=self.dynatemp_exponent,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            top_n_sigma=self.top_n_sigma,
            xtc_probability=self.xtc_probability,
            xtc_threshold=self.xtc_threshold,
            mirostat=self.mirostat,
            mirostat_tau=self.mirostat_tau,
            mirostat_eta=self.mirostat_eta,
            repetition_penalty=self.repeat_penalty,
            repeat_last_n=service.engine.max_context if last_n < 0 else last_n,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            dry_multiplier=self.dry_multiplier,
            dry_base=self.dry_base,
            dry_allowed_length=self.dry_allowed_length,
            dry_penalty_last_n=self.dry_penalty_last_n,
            dry_sequence_breakers=tuple(filter(None, self.dry_sequence_breakers)),
            logit_bias=self._biases(service),
            seed=None if self.seed in _RANDOM_SEEDS else self.seed,
            stop=tuple(filter(None, stop)),
            ignore_eos=self.ignore_eos,
            min_keep=self.min_keep,
            logprobs=self.n_probs or None,
            constraint=self._constraint(),
            samplers=self._samplers(),
        )

    def _samplers(self) -> tuple[str, ...]:
        if self.samplers is None:
            return _SAMPLERS
        return tuple(_RENAMED.get(name, name) for name in self.samplers)

    def _constraint(self) -> Constraint | None:
        if self.grammar and self.json_schema is not None:
            raise RequestError("'grammar' and 'json_schema' exclude each other.", param="grammar")
        if self.json_schema is not None:
            return Constraint.json_schema(self.json_schema, "json_schema")
        return Constraint("gbnf", self.grammar, "grammar") if self.grammar else None

    def _biases(self, service: Service) -> dict[int, float]:
        """Biases by id; of a text, each of its tokens gets the bias. ``false`` means never."""
        pairs = self.logit_bias
        biases: dict[int, float] = {}
        for key, value in pairs.items() if isinstance(pairs, dict) else pairs:
            if value is True or isinstance(value, str) or not isinstance(key, int | str):
                raise RequestError(
                    "a bias is a token id or a text with a number or false", param="logit_bias"
                )
            ids = [int(key)] if isinstance(key, int) else self._bias_ids(key, service)
            for token_id in ids:
                if not 0 <= token_id < service.tokenizer.vocab_size:
                    raise RequestError(f"{token_id} is no token id", param="logit_bias")
                biases[token_id] = float("-inf") if value is False else float(value)
        return biases

    def _bias_ids(self, key: str, service: Service) -> list[int]:
        if isinstance(self.logit_bias, dict) and key.isdecimal():
            return [int(key)]
        service.tokenizer.check_fits(key, service.engine.max_context, "logit_bias")
        return service.tokenizer.encode(key, add_special=False)
