"""Token rows for the demo model's training: packed source code and packed conversations.

Shapes: a row holds ``width`` input tokens; a batch is ``input_ids, labels`` of int64 [rows, width],
where ``labels[r, t]`` is the token after ``input_ids[r, t]``, or ``IGNORED`` where nothing is to be
learned.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from demo_chat import Message, TurnSource, render
from demo_corpus import Fact
from demo_export import END_OF_TEXT, IM_END, IM_START
from demo_tools import tool_conversation
from tokenizers import Tokenizer

IGNORED = -100
Row = tuple[list[int], list[int]]  # input ids, labels


class BatchSource:
    """An endless, seeded stream of batches.

    Most batches are 16 rows of 256 tokens, conversations and code mixed; every sixth has 10 rows of
    384 with tool calls, every sixteenth 4 rows of 1024 tokens of code, so that the whole context
    gets trained.
    """

    def __init__(
        self, tokenizer: Tokenizer, facts: list[Fact], code: np.ndarray, seed: int
    ) -> None:
        self.tokenizer = tokenizer
        self.code = code
        self.rng = random.Random(seed)
        self.turns = TurnSource(facts, seed + 1)
        self.padding = tokenizer.token_to_id(END_OF_TEXT)
        self.im_start, self.im_end = tokenizer.token_to_id(IM_START), tokenizer.token_to_id(IM_END)
        self.answer_head = tokenizer.encode("assistant\n").ids
        self._pending: list[Message] = []

    def batch(self, step: int, chat_share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch of a step; ``chat_share`` of the short rows are conversations."""
        if step % 32 == 31:
            rows = [self._code_row(1024) for _ in range(4)]
        elif step % 8 == 3:
            rows = [self._tool_row(384) for _ in range(6)] + [self._code_row(384) for _ in range(4)]
        else:
            chats = round(16 * chat_share)
            rows = [self._chat_row(256) for _ in range(chats)]
            rows += [self._code_row(256) for _ in range(16 - chats)]
        input_ids, labels = zip(*rows, strict=True)
        return torch.tensor(input_ids), torch.tensor(labels)

    def _code_row(self, width: int) -> Row:
        start = self.rng.randrange(len(self.code) - width)
        window = self.code[start : start + width + 1].tolist()
        return window[:-1], window[1:]

    def _chat_row(self, width: int) -> Row:
        """One conversation of as many turns as fit; the turn that does not opens the next row."""
        messages = self.turns.system_message()
        ids: list[int] = []
        while True:
            turn = self._pending or self.turns.next_turn()
            self._pending = []
            longer = self.tokenizer.encode(render(messages + turn)).ids
            if len(longer) > width + 1 and ids:
                self._pending = turn
                break
            messages, ids = messages + turn, longer
        return self._answers_only(ids, width)

    def _tool_row(self, width: int) -> Row:
        """A tool conversation, or, sometimes, a question that needs none of the tools on offer."""
        messages, tools = tool_conversation(self.rng)
        if self.rng.random() < 0.15:
            messages = self.turns.next_turn()
        return self._answers_only(self.tokenizer.encode(render(messages, tools)).ids, width)

    def _answers_only(self, ids: list[int], width: int) -> Row:
        """Pad or cut to ``width`` and keep the labels of the assistant's words and of their closing
        token."""
        ids = ids[: width + 1]
        ids = ids + [self.padding] * (width + 1 - len(ids))
        labels, head = [IGNORED] * (width + 1), self.answer_head
        position = 0
        while position < len(ids):
            if ids[position] == self.im_start and ids[position + 1 :][: len(head)] == head:
                position += 1 + len(head)
                while position < len(ids):
                    labels[position] = ids[position]
                    position += 1
                    if ids[position - 1] == self.im_end:
                        break
            else:
                position += 1
        return ids[:-1], labels[1:]


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents as one stream of uint16 tokens, each ended by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    encodings = tokenizer.encode_batch(texts)
    stream = [np.array([*encoding.ids, end], dtype=np.uint16) for encoding in encodings]
    return np.concatenate(stream)
