"""One assistant turn, whichever route asks for it: chat, responses, runs and batches start here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oxillama_torch.chat.prompt import Ask, prepare
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.server.output import Generation
from oxillama_torch.server.service import Service

__all__ = ["Turn", "effort_variables", "start_turn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn(Ask):
    """What an assistant turn is asked to be: see ``chat.prompt.Ask``.

    Args:
        adapters: (name, scale) pairs that it is generated with.
    """

    adapters: tuple[tuple[str, float], ...] = ()


def effort_variables(effort: str | None) -> dict[str, Any]:
    """Variables for the template. Most know two efforts, under one of two names."""
    if effort is None:
        return {}
    thinks = effort != "none"
    return {"reasoning_effort": effort, "enable_thinking": thinks, "thinking": thinks}


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
    prompt = prepare(turn, service.template, service.tokenizer)
    return Generation(
        service, [prompt.ids], prompt.params, deadline, turn.adapters, prompt.reply_format
    )
