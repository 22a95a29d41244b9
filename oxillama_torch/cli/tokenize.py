"""``oxillama tokenize`` and ``oxillama detokenize``: a model's tokenizer without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from oxillama_torch.config import demo_model_path
from oxillama_torch.gguf.reader import read_gguf
from oxillama_torch.tokenizer.tokenizer import Tokenizer

__all__ = ["detokenize", "tokenize"]

_Model = Annotated[
    Path | None, typer.Option("--model", "-m", help="GGUF file; without it the demo model.")
]


def tokenize(
    text: Annotated[str, typer.Argument(help="Text; - reads standard input.")],
    model: _Model = None,
    pieces: Annotated[
        bool, typer.Option("--pieces", help="Show each id with the bytes it stands for.")
    ] = False,
    special: Annotated[
        bool, typer.Option("--special", help="Let spellings of special tokens be those tokens.")
    ] = False,
    bare: Annotated[bool, typer.Option("--bare", help="Add no begin or end token.")] = False,
) -> None:
    """Print the token ids of a text."""
    if text == "-":
        text = typer.get_text_stream("stdin", encoding="utf-8").read()
    tokenizer = _load(model)
    ids = tokenizer.encode(text, add_special=not bare, parse_special=special)
    if not pieces:
        typer.echo(" ".join(map(str, ids)))
        return
    for token_id in ids:
        typer.echo(f"{token_id:>8}  {str(tokenizer.token_bytes(token_id))[1:]}")


def detokenize(
    ids: Annotated[list[int], typer.Argument(help="Token ids.")],
    model: _Model = None,
    skip_special: Annotated[
        bool, typer.Option("--skip-special", help="Leave special tokens out.")
    ] = False,
) -> None:
    """Print the text of token ids."""
    typer.echo(_load(model).decode(ids, skip_special=skip_special))


def _load(model: Path | None) -> Tokenizer:
    path = model if model is not None else demo_model_path()
    if not path.exists():
        raise FileNotFoundError(2, "no such model file", str(path))
    with read_gguf(path) as file:
        return Tokenizer.from_gguf(file.metadata)
