"""From the body of a response to a job that runs it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from oxillama_torch.chat.prompt import prepare
from oxillama_torch.chat.tool import Tool, tools_from
from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.sampling.philox import random_seed
from oxillama_torch.server.answer import deadline_of
from oxillama_torch.server.responses.builder import ResponseBuilder
from oxillama_torch.server.responses.event_log import EventLog
from oxillama_torch.server.responses.items import item_id, messages_of, parse_items
from oxillama_torch.server.responses.keeping import find_item, history, save_finished
from oxillama_torch.server.responses.runner import ResponseJob, Save
from oxillama_torch.server.schemas.responses import ResponseBody
from oxillama_torch.server.service import Service
from oxillama_torch.server.store.owner import current_owner
from oxillama_torch.server.store.store import Store
from oxillama_torch.server.turn import Turn, start_turn

__all__ = ["Draft", "count_tokens", "draft", "launch"]

Item = dict[str, Any]

# Tokens kept free for an answer without a limit, where old messages make room.
_ROOM = 256


@dataclass(slots=True)
class Draft:
    """A response that can be launched.

    Args:
        items: the response's own input, in full form.
        before: what it builds on.
        request: the body, for a background response that must be begun again.
    """

    body: ResponseBody
    service: Service
    adapters: tuple[tuple[str, float], ...]
    items: list[Item]
    before: list[Item]
    request: dict[str, Any]
    response: dict[str, Any] = field(default_factory=dict)

    def turn(self) -> Turn:
        """The assistant turn, with as much of what came before as fits where that is wanted."""
        instructions = self.body.instructions
        head = [] if instructions is None else [{"role": "system", "content": instructions}]
        messages = messages_of([*self.before, *self.items])
        params = self.body.sampling_params(self.service.tokenizer.vocab_size)
        params = replace(params, seed=self.request.get("seed"))
        turn = self.body.turn(head + messages, params, self.adapters)
        if self.body.truncation == "auto":
            turn = _fitting(self.service, turn)
        return turn


def draft(
    body: ResponseBody,
    found: tuple[Service, tuple[tuple[str, float], ...]],
    store: Store,
    remembered: list[Item] | None = None,
) -> Draft:
    """Gather what a response builds on.

    Args:
        found: what the body's model stands for.
        remembered: what comes before, where that is known already.

    Raises:
        RequestError: names the field.
    """
    service, adapters = found
    with store.read() as session:
        before = remembered
        if before is None:
            before = history(session, body.previous_response_id, body.conversation_id)
        known = {item["id"]: item for item in before}
        items = parse_items(
            body.items(), "input", lambda name: known.get(name) or find_item(session, name)
        )
    request = body.model_dump(mode="json", exclude_unset=True, exclude={"input"}, by_alias=True)
    request["input"] = []  # It is kept as items.
    if request.get("seed") is None:
        # A response that is begun again after a crash says the same again.
        request["seed"] = random_seed()
    made = Draft(body, service, adapters, items, before, request)
    made.response = _response(made, item_id("resp"))
    return made


def _response(made: Draft, response_id: str) -> dict[str, Any]:
    """The response object before it has begun."""
    body = made.body
    conversation = body.conversation_id
    text = body.text.model_dump(exclude_none=True, by_alias=True) if body.text else {}
    given = {"temperature": body.temperature, "top_p": body.top_p}
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "queued" if body.background else "in_progress",
        "background": bool(body.background),
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "conversation": None if conversation is None else {"id": conversation},
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": _reasoning(body),
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.stored,
        **{name: 1.0 if value is None else value for name, value in given.items()},
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": [_tool(tool) for tool in tools_from(body.tools or ())],
        "top_logprobs": body.top_logprobs or 0,
        "truncation": body.truncation or "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }


def _reasoning(body: ResponseBody) -> dict[str, Any]:
    given = body.reasoning
    return {
        "effort": given.effort if given else None,
        "summary": given.summary if given else None,
    }


def _tool(tool: Tool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description or None,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }


def launch(made: Draft, store: Store, *, streamed: bool, warm: bool = False) -> ResponseJob:
    """Submit the response's generation; the job is still to be started.

    Args:
        streamed: somebody reads its events. Those of a background response are kept anyway.
        warm: nothing is generated; the prompt is read, so that the next turn need not.

    Raises:
        RequestError, UnsupportedError, CapacityError: it cannot be generated.
    """
    background = made.response["background"]
    # A background response has no client whose patience could end.
    deadline = None if background else deadline_of(made.service)
    try:
        turn = made.turn()
        if warm:
            turn = replace(turn, params=replace(turn.params, max_tokens=0))
        generation = start_turn(made.service, turn, deadline)
    except RequestError as error:
        error.param = _own_param(error.param)
        raise
    builder = ResponseBuilder(
        made.response, made.service.tokenizer, logprobs=made.body.wants_logprobs, warm=warm
    )
    log = EventLog(keep=background) if streamed or background else None
    return ResponseJob(builder, generation, _saving(made, store), log, patient=background)


def _saving(made: Draft, store: Store) -> Save | None:
    if not made.body.stored:
        return None
    owner = current_owner()

    def save(job: ResponseJob):
        events = job.events() if made.response["background"] else None
        return save_finished(store, owner, made.response, made.items, made.request, events)

    return save


def _own_param(param: str | None) -> str | None:
    """Fields of chat completions by their names here."""
    for theirs, ours in (
        ("response_format.json_schema", "text.format"),
        ("response_format", "text.format"),
        ("messages", "input"),
    ):
        if param is not None and param.startswith(theirs):
            return ours + param.removeprefix(theirs)
    return param


def count_tokens(made: Draft) -> int:
    """Tokens of the prompt that the response would begin with."""
    return _prompt_tokens(made.service, made.turn())


def _prompt_tokens(service: Service, turn: Turn) -> int:
    if service.template is None:
        raise UnsupportedError("chat with a model whose file has no chat template")
    return len(prepare(turn, service.template, service.tokenizer).ids)


def _fitting(service: Service, turn: Turn) -> Turn:
    """The turn without as many of its oldest exchanges as it takes for the rest to fit.

    An exchange begins with a user's message; the system's messages and the last exchange stay.
    """
    head = [message for message in turn.messages if message["role"] == "system"]
    rest = [message for message in turn.messages if message["role"] != "system"]
    starts = [i for i, message in enumerate(rest) if message["role"] == "user" and i] or [0]

    def without(count: int) -> Turn:
        return turn if count == 0 else replace(turn, messages=head + rest[starts[count - 1] :])

    context = service.engine.max_context
    wanted = context - min(turn.params.max_tokens or _ROOM, context // 4)
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        if _prompt_tokens(service, without(middle)) <= wanted:
            high = middle
        else:
            low = middle + 1
    return without(low)
