"""Body of ``POST /v1/responses`` and of what counts its tokens."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from oxillama_torch.chat.tool import ToolChoice, tools_from
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server.responses.items import Item
from oxillama_torch.server.schemas.batches import Metadata
from oxillama_torch.server.schemas.common import GenerationBody, StrictModel, given
from oxillama_torch.server.schemas.lists import Few
from oxillama_torch.server.schemas.tools import Tools
from oxillama_torch.server.turn import Turn, effort_variables

__all__ = ["ResponseBody", "StreamQuery"]

_NAME = re.compile(r"[\w-]{1,64}", re.ASCII)


class StreamQuery(BaseModel):
    """Query of ``GET /v1/responses/{id}``."""

    stream: bool = False
    starting_after: Annotated[int, Field(ge=0)] | None = None


class TextFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    def chat_form(self) -> dict[str, Any] | None:
        """As ``response_format`` of chat completions."""
        if self.type != "json_schema":
            return None if self.type == "text" else {"type": self.type}
        if self.schema_ is None or not _NAME.fullmatch(self.name or ""):
            missing = "schema" if self.schema_ is None else "name"
            raise RequestError(
                f"'text.format.{missing}' is missing or invalid.", param=f"text.format.{missing}"
            )
        given = {"description": self.description, "strict": self.strict}
        schema = {"name": self.name, "schema": self.schema_}
        schema |= {name: value for name, value in given.items() if value is not None}
        return {"type": "json_schema", "json_schema": schema}


class TextConfig(StrictModel):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(StrictModel):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ConversationParam(StrictModel):
    id: str


Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


def _begins(name: str, kind: Any, without: tuple[str, ...]) -> dict[str, Any]:
    schema = given(name, kind)
    schema["properties"] |= {other: {"type": "null"} for other in without}
    return schema


class ResponseBody(GenerationBody):
    """Beside OpenAI's fields, the sampling fields of ``/v1/chat/completions`` are taken."""

    model_config = ConfigDict(
        json_schema_extra={
            "additionalProperties": False,
            "anyOf": [
                _begins("conversation", ["string", "object"], without=("previous_response_id",)),
                _begins("previous_response_id", "string", without=("conversation",)),
                _begins(
                    "input", ["string", "array"], without=("conversation", "previous_response_id")
                ),
            ],
            "allOf": [
                {
                    "anyOf": [
                        {"properties": {"store": {"enum": [True, None]}}},
                        {"properties": {"background": {"enum": [False, None]}}},
                    ]
                }
            ],
        }
    )
    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "context_management": ([],),
        "moderation": (),
        "n": (1,),
        "prompt": (),
    }
    # Hints for OpenAI's own caches and queues: they change no answer.
    HINTS: ClassVar[frozenset[str]] = frozenset(
        {"prompt_cache_options", "prompt_cache_retention", "service_tier"}
    )
    # Taken and shown again, and of no effect on a model that only writes text.
    SHOWN: ClassVar[tuple[str, ...]] = ("max_tool_calls", "prompt_cache_key", "safety_identifier")

    input: str | Few[Item] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | ConversationParam | None = None
    store: bool | None = None
    background: bool | None = None
    include: Few[Includable] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tool_calls: Annotated[int, Field(ge=0)] | None = None
    metadata: Metadata | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    reasoning: Reasoning | None = None
    safety_identifier: str | None = None
    text: TextConfig | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    tools: Tools | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    stream: bool | None = False

    @classmethod
    def parse(cls, body: dict[str, Any]) -> ResponseBody:
        """A checked body.

        Raises:
            RequestError, ValidationError: names the field.
        """
        parsed = cls.model_validate(body)
        parsed._check()
        return parsed

    def _check(self) -> None:
        """What the fields' types do not say."""
        self.ignored_fields()
        unknown = set(self.model_extra or ()) - self.HINTS - set(self.REFUSED)
        if self.n not in (None, 1):
            raise RequestError("'n' must be 1.", param="n")
        if unknown:
            name = min(unknown)
            raise RequestError(
                f"Unknown parameter: '{name[:64]}'.", code="unknown_parameter", param=name[:64]
            )
        if self.background and self.store is False:
            raise RequestError("'background' needs 'store'.", param="background")
        if self.conversation is not None and self.previous_response_id is not None:
            raise RequestError(
                "'conversation' and 'previous_response_id' exclude each other.",
                code="mutually_exclusive_parameters",
                param="conversation",
            )
        if self.input is None and self.conversation is None and self.previous_response_id is None:
            raise RequestError(
                "Missing required parameter: 'input'.",
                code="missing_required_parameter",
                param="input",
            )

    def without_effect(self) -> list[str]:
        """Names of the fields given that change nothing."""
        given = [name for name in self.SHOWN if getattr(self, name) is not None]
        if self.text is not None and self.text.verbosity is not None:
            given.append("text.verbosity")
        if self.reasoning is not None and self.reasoning.summary is not None:
            given.append("reasoning.summary")
        return sorted([*given, *(self.model_extra or ())])

    @property
    def stored(self) -> bool:
        return self.store is not False

    @property
    def conversation_id(self) -> str | None:
        given = self.conversation
        return given.id if isinstance(given, ConversationParam) else given

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    def items(self) -> list[dict[str, Any]]:
        """The input as items; a string is a user's message."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input or []

    def sampling_params(self, vocab_size: int) -> SamplingParams:
        """Sampling parameters; without a limit the answer may fill the context."""
        return SamplingParams(
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if self.wants_logprobs else None,
            **self.base_params(vocab_size),
        )

    def turn(self, messages: list[dict[str, Any]], params: SamplingParams, adapters: Any) -> Turn:
        """The assistant turn that the body asks for.

        Args:
            messages: all that comes before it.
            adapters: those that the model's name stands for; the body's own are added.

        Raises:
            RequestError: tools or formats that cannot be served.
        """
        tools = tools_from(self.tools or ())
        format_ = self.text.format if self.text is not None else None
        effort = self.reasoning.effort if self.reasoning is not None else None
        return Turn(
            messages=messages,
            params=params,
            adapters=adapters + self.adapters(),
            tools=tools,
            tool_choice=ToolChoice.of(self.tool_choice, tools),
            parallel_tool_calls=self.parallel_tool_calls is not False,
            response_format=format_.chat_form() if format_ is not None else None,
            template_kwargs=effort_variables(effort),
        )
