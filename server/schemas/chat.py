"""Body of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from oxillama_torch.chat.tool import ToolChoice, tools_from
from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server.schemas.batches import Metadata
from oxillama_torch.server.schemas.common import GenerationBody, StrictModel
from oxillama_torch.server.schemas.constraint import ConstraintFields
from oxillama_torch.server.schemas.lists import Few
from oxillama_torch.server.schemas.tools import Tools
from oxillama_torch.server.turn import Turn, effort_variables

__all__ = ["ChatBody"]


class TextPart(StrictModel):
    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    def value(self) -> str:
        return (self.text if self.type == "text" else self.refusal) or ""


class FunctionCall(StrictModel):
    name: str
    arguments: str


class ToolCall(StrictModel):
    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(StrictModel):
    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | Few[TextPart] | None = None
    name: str | None = None
    tool_calls: Few[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it: text content, ``developer`` as ``system``."""
        text = self.content
        if isinstance(text, list):
            text = "".join(part.value() for part in text)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text or "",
        }
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content is not None:
            message["reasoning_content"] = self.reasoning_content
        return message


class ChatBody(GenerationBody, ConstraintFields):
    REFUSED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (),
        "functions": ([],),
        "function_call": ("none",),
        "modalities": (["text"],),
        "prediction": (),
        "web_search_options": (),
    }

    messages: Annotated[Few[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    tools: Tools | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    reasoning_format: Literal["auto", "deepseek", "none"] = "auto"
    reasoning_budget: Annotated[int, Field(ge=-1)] | None = None
    thinking_token_budget: Annotated[int, Field(ge=-1)] | None = None

    def sampling_params(self, vocab_size: int) -> SamplingParams:
        """Sampling parameters; without a limit the answer may fill the context."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        limit = self.max_completion_tokens
        return SamplingParams(
            max_tokens=self.max_tokens if limit is None else limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            constraint=self.constraint(),
            **self.base_params(vocab_size),
        )

    def turn(self, params: SamplingParams, adapters: tuple[tuple[str, float], ...]) -> Turn:
        """The assistant turn that the body asks for."""
        tools = tools_from(self.tools or ())
        return Turn(
            messages=[message.for_template() for message in self.messages],
            params=params,
            adapters=adapters,
            tools=tools,
            tool_choice=ToolChoice.of(self.tool_choice, tools),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.response_format,
            template_kwargs={
                **effort_variables(self.reasoning_effort),
                **(self.chat_template_kwargs or {}),
            },
            reasoning_budget=self._reasoning_budget(),
            reasoning_apart=self.reasoning_format != "none",
        )

    def _reasoning_budget(self) -> int | None:
        """Most tokens of reasoning, by llama-server's name or vLLM's; -1 is no limit."""
        budget = self.reasoning_budget
        if budget is None:
            budget = self.thinking_token_budget
        return None if budget == -1 else budget
