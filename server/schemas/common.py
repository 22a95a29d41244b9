"""What chat and text completions share: strict types, sampling fields, refused fields."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.params import LogprobsMode
from oxillama_torch.server.schemas.lists import Many
from oxillama_torch.server.schemas.sampling import Finite, SamplerFields

__all__ = ["GenerationBody", "ModelBody", "StreamOptions", "StrictModel", "given", "with_integers"]


class StrictModel(BaseModel):
    """No coercion: ``"1"`` is no number and ``1.5`` no integer. Unknown fields are kept aside."""

    model_config = ConfigDict(strict=True, extra="allow")

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Any:
        """As pydantic's; ``4.0`` is an integer, as JSON schema has it: JSON knows one number."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            # Only then: most bodies need no second look.
            if not any(problem["type"] == "int_type" for problem in problems_of(error)):
                raise
            return super().model_validate(with_integers(obj), **options)


def given(name: str, kind: str | list[str], **more: Any) -> dict[str, Any]:
    """The JSON schema of an object in which a field is given, and not as null."""
    return {"required": [name], "properties": {name: {"type": kind, **more}}}


def problems_of(error: ValidationError) -> list[Any]:
    """The problems alone, without what is slow to write out."""
    return error.errors(include_url=False, include_context=False, include_input=False)


def with_integers(value: Any) -> Any:
    """A JSON value with integers in place of floats that are such and fit 64 bits."""
    if type(value) is float and -(2**63) < value < 2**63 and value.is_integer():
        return int(value)
    if type(value) is list:
        return [with_integers(item) for item in value]
    if type(value) is dict:
        return {key: with_integers(item) for key, item in value.items()}
    return value


class LoraChoice(StrictModel):
    """An adapter of one request, as OxiLLaMa has it."""

    name: str
    scale: Finite = 1.0


class StreamOptions(StrictModel):
    include_usage: bool = False


class ModelBody(StrictModel):
    """Fields of every body that names a model; ``lora`` is an extension."""

    # Fields that would change the answer and are not served: refused, never ignored.
    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str
    user: str | None = None
    lora: str | Many[LoraChoice] | None = None

    def ignored_fields(self) -> list[str]:
        """Names of fields that nothing reads; refuses those that would change the answer."""
        ignored = []
        for name, value in (self.model_extra or {}).items():
            if name not in self.REFUSED:
                ignored.append(name)
            elif value not in (None, *self.REFUSED[name]):
                raise RequestError(
                    f"{name!r} is not supported by this server.",
                    code="unsupported_parameter",
                    param=name,
                )
        return sorted(ignored)

    def adapters(self) -> tuple[tuple[str, float], ...]:
        """(name, scale) of the adapters that ``lora`` names."""
        if isinstance(self.lora, str):
            return ((self.lora, 1.0),)
        return tuple((choice.name, choice.scale) for choice in self.lora or ())


class GenerationBody(ModelBody, SamplerFields):
    """Fields of ``/v1/completions`` and ``/v1/chat/completions`` with one meaning in both.

    Those of ``SamplerFields`` are the usual extensions of local servers.
    """

    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: str | Many[str] | None = None
    seed: int | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    logprobs_mode: LogprobsMode | None = None

    def base_params(self, vocab_size: int) -> dict[str, Any]:
        """Keyword arguments of SamplingParams for the shared fields."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "n": self.n,
            "seed": self.seed,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "stop": self._stop(),
            "logit_bias": self._logit_bias(vocab_size),
            "logprobs_mode": self.logprobs_mode,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return {**self.sampler_params(), **given}

    def _stop(self) -> tuple[str, ...]:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > 16:
            raise RequestError("at most 16 stop strings", param="stop")
        return stop

    def _logit_bias(self, vocab_size: int) -> dict[int, float]:
        biases = {}
        for key, value in (self.logit_bias or {}).items():
            if not key.isdecimal() or int(key) >= vocab_size:
                raise RequestError(
                    f"{key!r} is no token id below {vocab_size}", param=f"logit_bias.{key}"
                )
            # OpenAI's -100 means "never": make it exact.
            biases[int(key)] = float("-inf") if value <= -100 else value
        return biases

    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "'stream_options' is only allowed when 'stream' is true.", param="stream_options"
            )
        return bool(self.stream_options and self.stream_options.include_usage)
