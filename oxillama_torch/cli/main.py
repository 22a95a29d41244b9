"""The ``oxillama`` command: subcommands, and errors turned into one line and an exit code.

Exit codes: 0 done · 2 no such model or wrong usage · 3 configuration or unsupported · 4 inference ·
5 server · 6 unreadable or malformed file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from oxillama_torch import __version__
from oxillama_torch.cli.bench import app as bench
from oxillama_torch.cli.chat import chat
from oxillama_torch.cli.info import info
from oxillama_torch.cli.kernels import app as kernels
from oxillama_torch.cli.lora import app as lora
from oxillama_torch.cli.profile import profile
from oxillama_torch.cli.run import run
from oxillama_torch.cli.serve import serve
from oxillama_torch.cli.tokenize import detokenize, tokenize
from oxillama_torch.cli.verify import verify
from oxillama_torch.errors import (
    CapacityError,
    EngineError,
    GGUFError,
    OxiLlamaError,
    RequestError,
    UnsupportedError,
)

__all__ = ["app", "exit_code", "main"]

app = typer.Typer(
    name="oxillama",
    help="Run GGUF models with packed weights on PyTorch and Triton.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
COMMANDS: tuple[Callable, ...] = (
    serve, run, chat, info, verify, tokenize, detokenize, profile,
)  # fmt: skip
for _command in COMMANDS:
    app.command()(_command)
app.add_typer(bench, name="bench", help="Time a model, or kernels one by one.")
app.add_typer(kernels, name="kernels", help="List, choose and check kernels.")
app.add_typer(lora, name="lora", help="Describe, merge and convert adapters.")


@app.callback(invoke_without_command=True)
def _options(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        typer.echo(f"oxillama-torch {__version__}")
        raise typer.Exit


def exit_code(error: Exception) -> int:
    """The exit code that tells the kinds of failure apart."""
    if isinstance(error, FileNotFoundError):
        return 2
    if isinstance(error, GGUFError | OSError):
        return 6
    if isinstance(error, UnsupportedError):
        return 3
    if isinstance(error, EngineError | CapacityError | RequestError):
        return 4
    return 1


def main() -> None:
    """Entry point: no traceback for errors that are not bugs of ours."""
    try:
        app()
    except (OxiLlamaError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())
