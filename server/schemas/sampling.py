"""Fields of a request that say how tokens are chosen, beyond OpenAI's: names of llama.cpp and vLLM.

Ranges are those of SamplingParams; NaN, infinities and numbers of the wrong kind get 400 here.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from oxillama_torch.sampling.presets import sampler_order, sampler_settings
from oxillama_torch.server.schemas.lists import Many

__all__ = ["Finite", "SamplerFields"]

Finite = Annotated[float, Field(allow_inf_nan=False)]
_Share = Annotated[Finite, Field(ge=0, le=1)]
_Count = Annotated[int, Field(ge=0, le=2**31)]
_Window = Annotated[int, Field(ge=-1, le=2**31)]
_Word = str | Many[int]

#: As many tokens as there can be: ``repeat_last_n`` -1 means the whole context.
_ALL = 2**31


class SamplerFields(BaseModel):
    """Extensions shared by every route that generates; unset ones keep the preset's value."""

    model_config = ConfigDict(strict=True)

    sampler_preset: str | None = None
    samplers: str | Annotated[list[str], Field(max_length=32)] | None = None
    top_k: _Count | None = None
    min_p: _Share | None = None
    min_keep: _Count | None = None
    repetition_penalty: Annotated[Finite, Field(ge=1e-3, le=1e3)] | None = None
    repeat_penalty: Annotated[Finite, Field(ge=1e-3, le=1e3)] | None = None
    repeat_last_n: _Window | None = None
    dry_multiplier: Annotated[Finite, Field(ge=0, le=1000)] | None = None
    dry_base: Annotated[Finite, Field(ge=1, le=1000)] | None = None
    dry_allowed_length: _Count | None = None
    dry_penalty_last_n: _Window | None = None
    dry_sequence_breakers: Annotated[list[_Word], Field(max_length=32)] | None = None
    top_n_sigma: Annotated[Finite, Field(ge=-1, le=1000)] | None = None
    typical_p: _Share | None = None
    top_a: _Share | None = None
    epsilon_cutoff: _Share | None = None
    eta_cutoff: _Share | None = None
    xtc_probability: _Share | None = None
    xtc_threshold: _Share | None = None
    dynatemp_range: Annotated[Finite, Field(ge=0, le=100)] | None = None
    dynatemp_exponent: Annotated[Finite, Field(ge=0, le=100)] | None = None
    mirostat: Annotated[int, Field(ge=0, le=2)] | None = None
    mirostat_tau: Annotated[Finite, Field(ge=0, le=100)] | None = None
    mirostat_eta: Annotated[Finite, Field(ge=0, le=100)] | None = None
    bad_words: Annotated[list[_Word], Field(max_length=256)] | None = None
    allowed_token_ids: Many[int] | None = None
    processors: Annotated[list[str], Field(max_length=16)] | None = None
    min_tokens: _Count | None = None
    stop_token_ids: Many[int] | None = None
    ignore_eos: bool = False

    def sampler_params(self) -> dict[str, Any]:
        """Keyword arguments of SamplingParams for the fields above."""
        params = {} if self.sampler_preset is None else sampler_settings(self.sampler_preset)
        for name in SamplerFields.model_fields:
            value = getattr(self, name)
            if value is not None:
                params[name] = value
        params.pop("sampler_preset", None)
        penalty = params.pop("repeat_penalty", None)
        if penalty is not None and self.repetition_penalty is None:
            params["repetition_penalty"] = penalty
        if params.get("repeat_last_n") == -1:
            params["repeat_last_n"] = _ALL
        if self.samplers is not None:
            params["samplers"] = sampler_order(self.samplers)
        return params
