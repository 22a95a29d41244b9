"""One response in the making: outputs of the generation in, typed events and the response out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from oxillama_torch.errors import CapacityError, RequestError
from oxillama_torch.sampling.params import TokenLogprobs
from oxillama_torch.server.errors import envelope
from oxillama_torch.server.openai.logprobs import chat_logprob
from oxillama_torch.server.openai.usage import Usage
from oxillama_torch.server.output import (
    Finished,
    Output,
    Piece,
    Reasoning,
    ToolCallArguments,
    ToolCallStarted,
)
from oxillama_torch.server.responses.items import item_id
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["ResponseBuilder"]

Event = dict[str, Any]

_TERMINAL = {
    "completed": "response.completed",
    "failed": "response.failed",
    "incomplete": "response.incomplete",
    # There is no event of its own for it.
    "cancelled": "response.incomplete",
}


class ResponseBuilder:
    """Builds the response object and, with it, its events, numbered from 0.

    Args:
        response: the object without output; it is changed in place.
        logprobs: whether texts carry log-probabilities.
        warm: nothing is generated, and that is not a cut.
    """

    def __init__(
        self,
        response: dict[str, Any],
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        warm: bool = False,
    ) -> None:
        self.response = response
        self._warm = warm
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._usage = Usage(1)
        self._sequence_number = 0
        self._item: dict[str, Any] | None = None
        self._texts: list[str] = []
        self._entries: list[dict[str, Any]] = []
        self._reason: str | None = None
        #: Whether the response has its final state.
        self.concluded = False

    def open(self) -> Iterator[Event]:
        """The first events."""
        yield self._about("response.created")
        if self.response["status"] == "queued":
            yield self._about("response.queued")
            self.response["status"] = "in_progress"
        yield self._about("response.in_progress")

    def add(self, output: Output) -> Iterator[Event]:
        """The events that ``output`` causes."""
        if isinstance(output, Piece):
            yield from self._piece(output)
        elif isinstance(output, Reasoning):
            yield from self._reasoning(output.text)
        elif isinstance(output, ToolCallStarted):
            yield from self._begin(
                type="function_call", id=item_id("fc"), status="in_progress",
                call_id=output.id, name=output.name, arguments="",
            )  # fmt: skip
        elif isinstance(output, ToolCallArguments):
            yield from self._arguments(output.text)
        else:
            self._usage.add(output)
            if isinstance(output, Finished):
                self._reason = output.reason

    def finish(self) -> Iterator[Event]:
        """The events that end the last item; the response has its final state after them."""
        cut = self._reason == "length" and not self._warm
        if not self.response["output"] and not self._warm:
            yield from self._message()
        yield from self._end("incomplete" if cut else "completed")
        self._conclude("incomplete" if cut else "completed")
        if cut:
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        self.response["usage"] = self._usage_object()

    def cancel(self) -> Iterator[Event]:
        """As ``finish``, for a response that somebody has cancelled."""
        yield from self._end("incomplete")
        self._conclude("cancelled")

    def fail(self, error: Exception) -> Iterator[Event]:
        """As ``finish``, for a response that could not be completed."""
        yield from self._end("incomplete")
        self._conclude("failed")
        code = "invalid_prompt" if isinstance(error, RequestError) else "server_error"
        if isinstance(error, RequestError) and error.status >= 500:
            code = "server_error"
        if isinstance(error, CapacityError):
            code = "rate_limit_exceeded"
        message = envelope(error)["error"]["message"]
        self.response["error"] = {"code": code, "message": message}

    def last_event(self) -> Event:
        """The one event that ends the stream; no other may come after it."""
        event = self._about(_TERMINAL[self.response["status"]])
        self._sequence_number -= 1
        return event

    def _conclude(self, status: str) -> None:
        self.response["status"] = status
        self.concluded = True
        if status == "completed":
            self.response["completed_at"] = int(time.time())

    def _usage_object(self) -> dict[str, Any]:
        usage = self._usage.as_dict()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "cache_write_tokens": 0,
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {
                "reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]
            },
            "total_tokens": usage["total_tokens"],
        }

    # Items

    def _begin(self, **item: Any) -> Iterator[Event]:
        """End the item before, if any, and begin one."""
        yield from self._end("completed")
        self._item, self._texts, self._entries = item, [], []
        self.response["output"].append(item)
        yield self._event(
            "response.output_item.added", output_index=self._output_index, item=dict(item)
        )
        if item["type"] != "function_call":
            yield self._in_item("response.content_part.added", part=self._part(""))

    def _end(self, status: str) -> Iterator[Event]:
        item = self._item
        if item is None:
            return
        text = "".join(self._texts)
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._in_item(
                "response.function_call_arguments.done", name=item["name"], arguments=text
            )
        else:
            item["content"] = [self._part(text)]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            extra = {"logprobs": _short(self._entries)} if item["type"] == "message" else {}
            yield self._in_item(f"response.{kind}.done", text=text, **extra)
            yield self._in_item("response.content_part.done", part=item["content"][0])
        item["status"] = status
        yield self._event("response.output_item.done", output_index=self._output_index, item=item)
        self._item = None

    def _part(self, text: str) -> dict[str, Any]:
        assert self._item is not None, "parts stand in items"
        if self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        logprobs = self._entries
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _piece(self, piece: Piece) -> Iterator[Event]:
        entries = self._describe(piece.logprobs) if self._logprobs else []
        if not piece.text and not entries:
            return
        if self._item is None or self._item["type"] != "message":
            yield from self._message()
        self._texts.append(piece.text)
        self._entries += entries
        self._sequence_number += 1
        # One of these per token of every stream: written out, it costs a third.
        yield {
            "type": "response.output_text.delta",
            "sequence_number": self._sequence_number - 1,
            "item_id": self._item["id"],
            "output_index": self._output_index,
            "content_index": 0,
            "delta": piece.text,
            "logprobs": _short(entries) if entries else [],
        }

    def _message(self) -> Iterator[Event]:
        message = {"type": "message", "id": item_id("msg"), "status": "in_progress"}
        yield from self._begin(**message, role="assistant", content=[])

    def _describe(self, entry: TokenLogprobs | None) -> list[dict[str, Any]]:
        if entry is None:
            return []
        return [chat_logprob(entry, self._tokenizer)]

    def _reasoning(self, text: str) -> Iterator[Event]:
        if self._item is None or self._item["type"] != "reasoning":
            yield from self._begin(
                type="reasoning", id=item_id("rs"), status="in_progress", summary=[], content=[]
            )
        self._texts.append(text)
        yield self._in_item("response.reasoning_text.delta", delta=text)

    def _arguments(self, text: str) -> Iterator[Event]:
        self._texts.append(text)
        yield self._in_item("response.function_call_arguments.delta", delta=text)

    # Events

    @property
    def _output_index(self) -> int:
        return len(self.response["output"]) - 1

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence_number, **fields}
        self._sequence_number += 1
        return event

    def _about(self, kind: str) -> Event:
        return self._event(kind, response=self.response)

    def _in_item(self, kind: str, **fields: Any) -> Event:
        assert self._item is not None, "an item has begun"
        where = {"item_id": self._item["id"], "output_index": self._output_index}
        if self._item["type"] != "function_call":
            where["content_index"] = 0
        return self._event(kind, **where, **fields)


def _short(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Log-probabilities as events carry them: without bytes."""

    def pick(entry: dict[str, Any]) -> dict[str, Any]:
        return {"token": entry["token"], "logprob": entry["logprob"]}

    return [
        {**pick(entry), "top_logprobs": [pick(top) for top in entry["top_logprobs"]]}
        for entry in entries
    ]
