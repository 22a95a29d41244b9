"""``oxillama chat``: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from oxillama_torch.cli.open_llm import open_llm
from oxillama_torch.cli.options import (
    ContextOption,
    DeviceOption,
    GraphsOption,
    KernelPathOption,
    KernelsOption,
    KVDtypeOption,
    ModelOption,
    NumericsOption,
    ThreadsOption,
    TunedOption,
    engine_config,
)
from oxillama_torch.errors import OxiLlamaError
from oxillama_torch.sampling.params import SamplingParams

__all__ = ["Conversation", "chat"]

HELP = "/help  /reset  /system TEXT  /save FILE  /load FILE  /quit"


class Conversation:
    """Messages so far, and the commands that change them."""

    def __init__(self, system: str | None = None) -> None:
        self.messages: list[dict] = []
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Forget everything but a system message."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def command(self, line: str) -> str:
        """Carry out ``/reset``, ``/system``, ``/save`` or ``/load``; returns what to print."""
        name, _, argument = line.partition(" ")
        if name == "/reset":
            system = [m["content"] for m in self.messages if m["role"] == "system"]
            self.reset(system[0] if system else None)
            return "forgotten"
        if name == "/system":
            self.reset(argument)
            return "new conversation with this system message"
        if name == "/save" and argument:
            Path(argument).write_text(json.dumps(self.messages, indent=2), encoding="utf-8")
            return f"{len(self.messages)} messages written to {argument}"
        if name == "/load" and argument:
            self.messages = _checked(json.loads(Path(argument).read_text(encoding="utf-8")))
            return f"{len(self.messages)} messages read from {argument}"
        return HELP


def _checked(messages: object) -> list[dict]:
    ok = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not ok:
        raise ValueError("not a list of messages with role and content")
    return messages


def chat(
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1)] = 512,
    temperature: Annotated[float, typer.Option("--temperature", "--temp")] = 0.0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", "-s")] = None,
    device: DeviceOption = None,
    kv_dtype: KVDtypeOption = None,
    numerics: NumericsOption = None,
    graphs: GraphsOption = None,
    kernels: KernelsOption = None,
    kernel_path: KernelPathOption = None,
    tuned: TunedOption = None,
    ctx_size: ContextOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Chat with a model; /help lists the commands."""
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    config = engine_config(
        model,
        device=device,
        kv_dtype=kv_dtype,
        numerics=numerics,
        graphs=graphs,
        kernels=kernels,
        kernel_path=kernel_path,
        tuned=tuned,
        max_context=ctx_size,
        threads=threads,
        max_batch_size=1,
    )
    conversation = Conversation(system)
    with open_llm(config) as llm:
        print(f"{llm.describe()}. {HELP}")
        while (line := _read()) not in (None, "/quit", "/exit"):
            if line.startswith("/"):
                _command(conversation, line)
            elif line:
                _turn(llm, conversation, line, params)


def _read() -> str | None:
    """One line from the user; None at the end of input."""
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None


def _command(conversation: Conversation, line: str) -> None:
    try:
        print(conversation.command(line))
    except (OSError, ValueError) as error:
        print(f"error: {error}")


def _turn(llm, conversation: Conversation, line: str, params: SamplingParams) -> None:
    """One question and its answer; Ctrl-C stops the answer, not the conversation."""
    conversation.messages.append({"role": "user", "content": line})
    pieces: list[str] = []
    try:
        for piece in llm.stream(llm.chat_ids(conversation.messages), params):
            pieces.append(piece.text)
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" [stopped]")
    except OxiLlamaError as error:
        conversation.messages.pop()
        print(f"error: {error}")
        return
    sys.stdout.write("\n")
    conversation.messages.append({"role": "assistant", "content": "".join(pieces)})
