"""One turn of a run in the making: outputs of the generation in, objects and their events out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from oxillama_torch.server.assistants.objects import Object, new_message, new_step, text_content
from oxillama_torch.server.output import (
    Finished,
    Output,
    Piece,
    Started,
    ToolCallArguments,
    ToolCallStarted,
)

__all__ = ["Event", "RunBuilder"]

#: An event's name and its object.
Event = tuple[str, Object]

_CUT_SHORT = {"code": "server_error", "message": "The call was cut short by a limit of tokens."}


class RunBuilder:
    """Changes the run, and the step and message it is at; says which events that makes.

    Args:
        run: the run object.
        usage: tokens of the run's earlier turns; counted on.

    Attributes:
        step, message: those in progress, or None.
        changed: objects to be stored, in the order in which they came to be.
    """

    def __init__(self, run: Object, usage: dict[str, int]) -> None:
        self.run, self.usage, self._before = run, usage, dict(usage)
        self.step: Object | None = None
        self.message: Object | None = None
        self.changed: list[Object] = [run]
        self._texts: list[str] = []
        self._reason = "stop"

    # Events as they come

    def open(self) -> Iterator[Event]:
        """The run is taken up: queued, then in progress."""
        self.run.update(status="queued", required_action=None)
        yield "thread.run.queued", self.run
        self.run["status"] = "in_progress"
        self.run["started_at"] = self.run["started_at"] or _now()
        self._note(self.run)
        yield "thread.run.in_progress", self.run

    def answered(self, step: Object, outputs: dict[str, str]) -> Iterator[Event]:
        """The client has run the tools of ``step``."""
        for call in step["step_details"]["tool_calls"]:
            call["function"]["output"] = outputs[call["id"]]
        self.step = step
        yield from self._end_step("completed")

    def add(self, output: Output) -> Iterator[Event]:
        """The events that ``output`` causes."""
        if isinstance(output, Piece) and output.text:
            yield from self._text(output.text)
        elif isinstance(output, ToolCallStarted):
            yield from self._call(output)
        elif isinstance(output, ToolCallArguments):
            assert self.step is not None, "arguments follow the start of a call"
            call = self.step["step_details"]["tool_calls"][output.call]
            call["function"]["arguments"] += output.text
            yield self._call_delta(output.call, function={"arguments": output.text})
        elif isinstance(output, Started):
            self._count("prompt_tokens", output.prompt_tokens)
        elif isinstance(output, Finished):
            self._count("completion_tokens", output.completion_tokens)
            self._reason = output.reason

    # The end of a turn; its events go out once everything is stored

    def finish(self) -> Iterator[Event]:
        """All outputs have come."""
        if self._reason == "tool_calls":
            yield from self._require_action()
            return
        cut = self._reason == "length"
        if self.step is None:
            yield from self._begin_message()
        yield from self._end_message("max_tokens" if cut else None)
        calls = self.step is not None and self.step["type"] == "tool_calls"
        yield from self._end_step("failed" if calls else "completed", _CUT_SHORT if calls else None)
        if cut:
            self.run["incomplete_details"] = {"reason": "max_completion_tokens"}
        yield self._end_run("incomplete" if cut else "completed")

    def too_long(self) -> Iterator[Event]:
        """The thread does not fit the run's own limit."""
        self.run["incomplete_details"] = {"reason": "max_prompt_tokens"}
        yield self._end_run("incomplete")

    def end(self, status: str, error: Object | None = None) -> Iterator[Event]:
        """End early: ``cancelled``, ``expired``, or ``failed`` with an error."""
        if status == "cancelled":
            self.run["status"] = "cancelling"
            yield "thread.run.cancelling", dict(self.run)
        yield from self._end_message(f"run_{status}")
        known = error is None or error["code"] != "invalid_prompt"
        yield from self._end_step(status, error if known else {**error, "code": "server_error"})
        self.run["last_error"] = error
        yield self._end_run(status)

    # Parts

    def _text(self, text: str) -> Iterator[Event]:
        if self.step is not None and self.step["type"] == "tool_calls":
            return  # a run stops at its calls: what a model says after them is not kept
        if self.message is None:
            yield from self._begin_message()
        self._texts.append(text)
        delta = {"index": 0, **text_content(text)}
        yield (
            "thread.message.delta",
            {
                "id": self.message["id"],
                "object": "thread.message.delta",
                "delta": {"content": [delta]},
            },
        )

    def _call(self, output: ToolCallStarted) -> Iterator[Event]:
        yield from self._end_message(None)
        if self.step is not None and self.step["type"] == "message_creation":
            yield from self._end_step("completed")
        if self.step is None:
            yield from self._begin_step("tool_calls", [])
        function = {"name": output.name, "arguments": "", "output": None}
        self.step["step_details"]["tool_calls"].append(
            {"id": output.id, "type": "function", "function": function}
        )
        yield self._call_delta(output.call, id=output.id, function=dict(function))

    def _call_delta(self, index: int, **fields: Any) -> Event:
        call = {"index": index, "type": "function", **fields}
        details = {"type": "tool_calls", "tool_calls": [call]}
        return (
            "thread.run.step.delta",
            {
                "id": self.step["id"],
                "object": "thread.run.step.delta",
                "delta": {"step_details": details},
            },
        )

    def _begin_message(self) -> Iterator[Event]:
        message = new_message(self.run["thread_id"], "assistant", [], run=self.run)
        yield from self._begin_step("message_creation", {"message_id": message["id"]})
        self.message = message
        self._note(message)
        yield "thread.message.created", message
        yield "thread.message.in_progress", message

    def _begin_step(self, kind: str, details: Any) -> Iterator[Event]:
        self.step = new_step(self.run, kind, details)
        self._note(self.step)
        yield "thread.run.step.created", self.step
        yield "thread.run.step.in_progress", self.step

    def _end_message(self, reason: str | None) -> Iterator[Event]:
        """End the message in progress, if there is one; with a reason it is incomplete."""
        if self.message is None:
            return
        message, self.message = self.message, None
        message["content"] = [text_content("".join(self._texts))]
        self._texts = []
        status = "completed" if reason is None else "incomplete"
        message["status"], message[f"{status}_at"] = status, _now()
        if reason is not None:
            message["incomplete_details"] = {"reason": reason}
        self._note(message)
        yield f"thread.message.{status}", message

    def _end_step(self, status: str, error: Object | None = None) -> Iterator[Event]:
        if self.step is None:
            return
        step, self.step = self.step, None
        step.update({"status": status, f"{status}_at": _now(), "last_error": error})
        step["usage"] = step["usage"] or self._of_this_turn()
        self._note(step)
        yield f"thread.run.step.{status}", step

    def _require_action(self) -> Iterator[Event]:
        calls = [
            {**call, "function": {k: call["function"][k] for k in ("name", "arguments")}}
            for call in self.step["step_details"]["tool_calls"]
        ]
        self.step["usage"] = self._of_this_turn()
        self._note(self.step)
        self.run["status"] = "requires_action"
        self.run["required_action"] = {
            "type": "submit_tool_outputs",
            "submit_tool_outputs": {"tool_calls": calls},
        }
        self._note(self.run)
        yield "thread.run.requires_action", self.run

    def _end_run(self, status: str) -> Event:
        self.run.update(
            status=status, expires_at=None, required_action=None, usage=dict(self.usage)
        )
        if status in ("completed", "cancelled", "failed"):
            self.run[f"{status}_at"] = _now()
        self._note(self.run)
        return f"thread.run.{status}", self.run

    def _of_this_turn(self) -> dict[str, int]:
        return {name: self.usage[name] - self._before[name] for name in self.usage}

    def _count(self, name: str, tokens: int) -> None:
        self.usage[name] += tokens
        self.usage["total_tokens"] += tokens

    def _note(self, changed: Object) -> None:
        self.changed = [o for o in self.changed if o["id"] != changed["id"]] + [changed]


def _now() -> int:
    return int(time.time())
