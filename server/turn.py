"""One assistant turn, whichever route asks for it: chat, responses, runs and batches start here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oxillama_torch.chat.tool import Tool
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.sampling.params import SamplingParams
from oxillama_torch.server.output import Generation
from oxillama_torch.server.service import Service

__all__ = ["Turn", "start_turn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What an assistant turn is asked to be.

    Args:
        messages: as chat templates know them (system, user, assistant, tool).
        params: sampling parameters; ``n`` choices.
        adapters: (name, scale) pairs.
        tools: what the model may call.
        tool_choice: ``none``, ``auto``, ``required``, or ``=NAME`` for one function.
        parallel_tool_calls: whether one turn may make several calls.
        response_format: the chat route's object (``json_schema``, ``json_object`` or ``text``).
        template_kwargs: variables for the chat template.
        reasoning_budget: most tokens of reasoning; None: no limit.
    """

    messages: list[dict[str, Any]]
    params: SamplingParams
    adapters: tuple[tuple[str, float], ...] = ()
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    template_kwargs: dict[str, Any] | None = None
    reasoning_budget: int | None = None


def start_turn(service: Service, turn: Turn, deadline: float | None = None) -> Generation:
    """Render, constrain and submit a turn.

    Args:
        deadline: ``time.monotonic()`` at which its choices end, or None.

    Raises:
        UnsupportedError: the model has no chat template.
        RequestError: messages, tools or formats that cannot be served.
        CapacityError: too many requests.
    """
    if service.template is None:
        raise UnsupportedError("chat with a model whose file has no chat template")
    prompt = service.template.render_ids(turn.messages, **(turn.template_kwargs or {}))
    return Generation(service, [prompt], turn.params, deadline, turn.adapters)
