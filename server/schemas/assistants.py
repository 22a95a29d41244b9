"""Bodies of the Assistants API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints

from oxillama_torch.chat.tool import ToolChoice, tools_from
from oxillama_torch.errors import RequestError
from oxillama_torch.server.schemas.batches import Metadata
from oxillama_torch.server.schemas.common import Finite, StrictModel, given
from oxillama_torch.server.schemas.lists import Few
from oxillama_torch.server.schemas.tools import Tools

__all__ = [
    "AssistantBody",
    "AssistantChanges",
    "CreateAndRunBody",
    "MessageBody",
    "MetadataBody",
    "RunBody",
    "ThreadBody",
    "ToolOutputsBody",
]

Instructions = Annotated[str, StringConstraints(max_length=256_000)]
Temperature = Annotated[Finite, Field(ge=0, le=2)]
TopP = Annotated[Finite, Field(ge=0, le=1)]
ResponseFormat = Literal["auto"] | dict[str, Any]
Text = Annotated[str, StringConstraints(min_length=1)]

_EMPTY = {"maxProperties": 0, "maxItems": 0}


class _Resources(StrictModel):
    """``tool_resources`` are for hosted tools, which are not here."""

    tool_resources: Annotated[dict[str, Any], Field(json_schema_extra=_EMPTY)] | None = None

    def model_post_init(self, _context: Any) -> None:
        if any((self.tool_resources or {}).values()):
            raise _unsupported("tool_resources")


def _unsupported(name: str) -> RequestError:
    return RequestError(
        f"{name!r} is not supported by this server.", code="unsupported_parameter", param=name
    )


class AssistantChanges(_Resources):
    """What may be changed about an assistant; fields that are not given stay."""

    model: str = ""
    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    description: Annotated[str, StringConstraints(max_length=512)] | None = None
    instructions: Instructions | None = None
    tools: Tools | None = None
    metadata: Metadata | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None

    def given(self) -> dict[str, Any]:
        """The assistant's fields that the body has."""
        if self.tools:
            tools_from(self.tools)
        fields = self.model_dump(exclude=set(self.model_extra))
        given = {name: fields[name] for name in fields if name in self.model_fields_set}
        for name, empty in (("tools", []), ("metadata", {}), ("tool_resources", {})):
            if name in given:
                given[name] = given[name] or empty
        return given


class AssistantBody(AssistantChanges):
    model: str

    def fields(self) -> dict[str, Any]:
        """All fields of the new assistant."""
        defaults = {
            "name": None,
            "description": None,
            "model": self.model,
            "instructions": None,
            "tools": [],
            "tool_resources": {},
            "metadata": {},
            "temperature": 1.0,
            "top_p": 1.0,
            "response_format": "auto",
            "reasoning_effort": None,
        }
        return {**defaults, **{k: v for k, v in self.given().items() if v is not None}}


class MessageText(StrictModel):
    type: Literal["text"]
    text: Text


class MessageBody(StrictModel):
    """``attachments`` are for hosted tools."""

    role: Literal["user", "assistant"]
    content: Text | Annotated[Few[MessageText], Field(min_length=1)]
    metadata: Metadata | None = None
    attachments: Annotated[list[Any], Field(json_schema_extra=_EMPTY)] | None = None

    def model_post_init(self, _context: Any) -> None:
        if self.attachments:
            raise _unsupported("attachments")

    def texts(self) -> list[str]:
        """The texts of the message."""
        return [self.content] if isinstance(self.content, str) else [p.text for p in self.content]


class MetadataBody(_Resources):
    metadata: Metadata | None = None


class ThreadBody(MetadataBody):
    messages: Few[MessageBody] = []


class TruncationStrategy(StrictModel):
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {
                    "properties": {"type": {"const": "auto"}, "last_messages": {"type": "null"}},
                },
                {
                    "properties": {
                        "type": {"const": "last_messages"},
                        "last_messages": {"type": "integer"},
                    },
                    "required": ["last_messages"],
                },
            ]
        }
    )

    type: Literal["auto", "last_messages"]
    last_messages: Annotated[int, Field(ge=1)] | None = None

    def model_post_init(self, _context: Any) -> None:
        if (self.type == "last_messages") != (self.last_messages is not None):
            raise RequestError(
                "'last_messages' goes with the strategy of that name.",
                param="truncation_strategy.last_messages",
            )


class RunBody(StrictModel):
    """``max_tokens``, and a run without an assistant but with a model, are OxiLLaMa's."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [given("assistant_id", "string"), given("model", "string", minLength=1)]
        }
    )

    assistant_id: str | None = None
    model: str | None = None
    instructions: Instructions | None = None
    additional_instructions: Instructions | None = None
    additional_messages: Few[MessageBody] | None = None
    tools: Tools | None = None
    metadata: Metadata | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    stream: bool | None = None
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    truncation_strategy: TruncationStrategy | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None

    def fields(self, assistant: dict[str, Any] | None) -> dict[str, Any]:
        """Fields of the new run: the body's, else the assistant's."""
        base = assistant or {}
        model = self.model or base.get("model")
        if model is None:
            raise RequestError(
                "'assistant_id' is needed.",
                code="missing_required_parameter",
                param="assistant_id",
            )
        tools = base.get("tools", []) if self.tools is None else self.tools
        ToolChoice.of(self.tool_choice, tools_from(tools))
        strategy = self.truncation_strategy or TruncationStrategy(type="auto")
        return {
            "assistant_id": self.assistant_id or "",
            "model": model,
            "instructions": self._instructions(base),
            "tools": tools,
            "metadata": self.metadata or {},
            "temperature": _first(self.temperature, base.get("temperature"), 1.0),
            "top_p": _first(self.top_p, base.get("top_p"), 1.0),
            "max_prompt_tokens": self.max_prompt_tokens,
            "max_completion_tokens": _first(self.max_completion_tokens, self.max_tokens),
            "truncation_strategy": {
                "type": strategy.type,
                "last_messages": strategy.last_messages,
            },
            "tool_choice": self.tool_choice or "auto",
            "parallel_tool_calls": _first(self.parallel_tool_calls, True),
            "response_format": _first(self.response_format, base.get("response_format"), "auto"),
            "reasoning_effort": _first(self.reasoning_effort, base.get("reasoning_effort")),
        }

    def _instructions(self, assistant: dict[str, Any]) -> str:
        own = _first(self.instructions, assistant.get("instructions"), "")
        return "\n\n".join(filter(None, (own, self.additional_instructions)))


class CreateAndRunBody(RunBody, _Resources):
    thread: ThreadBody = ThreadBody()


class ToolOutput(StrictModel):
    tool_call_id: str
    output: str = ""


class ToolOutputsBody(StrictModel):
    tool_outputs: Few[ToolOutput]
    stream: bool | None = None

    def by_call(self, asked: list[str]) -> dict[str, str]:
        """The output of each call that was asked for.

        Raises:
            RequestError: some are missing, or nobody asked for them.
        """
        outputs = {item.tool_call_id: item.output for item in self.tool_outputs}
        if outputs.keys() != set(asked) or len(outputs) != len(self.tool_outputs):
            raise RequestError(
                f"Expected tool outputs for call_ids {asked}, got "
                f"{[item.tool_call_id[:256] for item in self.tool_outputs]}",
                param="tool_outputs",
            )
        return outputs


def _first(*values: Any) -> Any:
    """The first value that is given."""
    return next((value for value in values if value is not None), None)
