#!/usr/bin/env python3
"""How much each GGML type costs a model: loss on held-out text, beside llama.cpp's on the same.

    python scripts/quantization_table.py FOLDER [--llama-cpp] [--kernels RULES] [--out TABLE.md]
``FOLDER`` holds one file per type, named after it (``quantization_files.py`` makes them); F32.gguf
is what the others are compared with. Loss is in nats per token, over windows of 512 tokens of
``demo_heldout.txt``; "more" is the mean difference to F32 over the windows, with its standard
error. With ``--llama-cpp`` (needs the llama_cpp package) the same windows go through llama.cpp,
its KV cache in float32. "apart" is the root mean square difference of single log-probabilities.
llama.cpp rounds activations to 8 bits before products with quantized weights, and we do not; so it
reads the file of ``FOLDER/widened`` too: the same weights in float32, decoded by llama.cpp.
With ``--kernels`` (as ``--kernels`` of ``oxillama``) each file is measured once more in ``fast``
numerics and with these kernels: what their rounding costs.
"""

from __future__ import annotations

import in_environment  # noqa: F401 (first of all: what follows is in .venv)

# isort: split
import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from eval_demo import HERE, WINDOW
from rich.progress import track

from oxillama_torch import LLM, read_gguf
from oxillama_torch.gguf.types import TYPE_SIZES, GGMLType
from oxillama_torch.kernels.registry import use_kernels

# What should lose no less than what stands before it: the same method with fewer bits. Q1_0, Q2_0,
# TQ1_0 and TQ2_0 are for models that were trained in them, and have no place among these.
ORDERS = (
    ("F32", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K"),
    ("F32", "Q8_0", "Q5_1", "Q4_1"),
    ("F32", "Q8_0", "Q5_0", "Q4_0"),
    ("F32", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
    ("F32", "F16", "BF16"),
)

Logprobs = np.ndarray  # float64 [windows, WINDOW]


@dataclass(frozen=True)
class Row:
    """What was measured of one file."""

    type_name: str
    ours: Logprobs
    theirs: Logprobs | None
    widened: Logprobs | None
    by_kernels: Logprobs | None

    @property
    def bits(self) -> float:
        size = TYPE_SIZES[GGMLType[self.type_name]]
        return 8 * size.block_bytes / size.block_weights


def windows(llm: LLM) -> Iterator[list[int]]:
    """Token ids of the held-out text, WINDOW + 1 at a time; windows share the id between them."""
    ids = llm.tokenize((HERE / "demo_heldout.txt").read_text(encoding="utf-8"))
    for start in range(0, (len(ids) - 1) // WINDOW * WINDOW, WINDOW):
        yield ids[start : start + WINDOW + 1]


def measure(path: Path, llama_cpp: bool, kernels: str | None) -> Row:
    with LLM(path, numerics="invariant") as llm:
        texts = list(windows(llm))
        ours = by_us(llm, texts)
    by_kernels = None
    if kernels is not None:
        with use_kernels(kernels), LLM(path, numerics="fast") as llm:
            by_kernels = by_us(llm, texts)
    wide = path.parent / "widened" / path.name
    return Row(
        path.stem,
        ours,
        by_llama_cpp(path, texts) if llama_cpp else None,
        by_llama_cpp(wide, texts) if llama_cpp and wide.exists() else None,
        by_kernels,
    )


def by_us(llm: LLM, texts: Sequence[list[int]]) -> Logprobs:
    return np.array([llm.score(ids).logprobs[1:] for ids in texts])


def by_llama_cpp(path: Path, texts: Sequence[list[int]]) -> Logprobs:
    """The same log-probabilities by llama.cpp."""
    from llama_cpp import GGML_TYPE_F32, Llama

    llama = Llama(
        str(path), n_ctx=WINDOW + 1, n_batch=WINDOW + 1, n_threads=2, logits_all=True,
        type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32, flash_attn=False, verbose=False,
    )  # fmt: skip
    found = []
    for ids in texts:
        llama.reset()
        llama.eval(ids)
        logits = np.array(llama.scores[: len(ids) - 1], dtype=np.float64)
        total = np.logaddexp.reduce(logits, axis=1)
        found.append(logits[np.arange(len(ids) - 1), ids[1:]] - total)
    llama.close()
    return np.array(found)


def table(rows: Sequence[Row]) -> str:
    base = next(row for row in rows if row.type_name == "F32")
    with_theirs = base.theirs is not None
    head = ["type", "bits", "nats per token", "perplexity", "more than F32"]
    if with_theirs:
        head += ["llama.cpp", "more than F32", "apart", "apart, widened"]
    if base.by_kernels is not None:
        head += ["perplexity with the kernels", "more than without"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in sorted(rows, key=lambda row: -row.bits):
        nats = -row.ours.mean()
        cells = [row.type_name, f"{row.bits:.4g}", f"{nats:.4f}", f"{math.exp(nats):.2f}"]
        cells.append(_more(row.ours, base.ours))
        if with_theirs:
            cells += [f"{-row.theirs.mean():.4f}", _more(row.theirs, base.theirs)]
            cells += [_apart(row.ours, row.theirs), _apart(row.ours, row.widened)]
        if row.by_kernels is not None:
            cells += [f"{math.exp(-row.by_kernels.mean()):.3f}", _more(row.by_kernels, row.ours, 5)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _apart(ours: Logprobs, theirs: Logprobs | None) -> str:
    return "" if theirs is None else f"{math.sqrt(np.square(ours - theirs).mean()):.2g}"


def _more(logprobs: Logprobs, base: Logprobs, digits: int = 4) -> str:
    """Mean extra loss, and its standard error over windows."""
    per_window = (base - logprobs).mean(axis=1)
    error = per_window.std(ddof=1) / math.sqrt(len(per_window))
    return f"{per_window.mean():+.{digits}f} ± {error:.{digits}f}"


def out_of_order(rows: Sequence[Row], of: Callable[[Row], Logprobs]) -> list[str]:
    """Neighbours in ``ORDERS`` of which the later loses less, by more than two standard errors."""
    found = {row.type_name: of(row) for row in rows}
    wrong = []
    for order in ORDERS:
        present = [name for name in order if name in found]
        for better, worse in zip(present, present[1:]):
            gained = (found[worse] - found[better]).mean(axis=1)
            error = gained.std(ddof=1) / math.sqrt(len(gained))
            if gained.mean() > 2 * error:
                wrong.append(f"{worse} loses {gained.mean():.4f} ± {error:.4f} less than {better}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama-cpp", action="store_true", help="llama.cpp's figures beside ours")
    parser.add_argument("--kernels", metavar="RULES", help="measure these kernels too")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    paths = [p for p in sorted(options.folder.glob("*.gguf")) if p.stem in GGMLType.__members__]
    if "F32" not in [path.stem for path in paths]:
        parser.error(f"{options.folder} has no F32.gguf to compare with")
    for path in paths:
        read_gguf(path).close()  # refuse a broken file before an hour of work, not after
    rows = [measure(path, options.llama_cpp, options.kernels) for path in track(paths, "measuring")]
    lines = [table(rows), ""]
    lines += out_of_order(rows, lambda row: row.ours) or ["Everything is in the expected order."]
    text = "\n".join(lines)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
