#!/usr/bin/env python3
"""Write a model once in each GGML type: what ``quantization_table.py`` measures.

    python scripts/quantization_files.py FOLDER [--model FILE] [--tools BIN]
``BIN`` holds llama.cpp's ``llama-quantize`` and ``llama-imatrix``; without it, only the types that
gguf-py encodes are written. Every matrix of the layers gets the one type; the embedding, which is
the head too, is Q8_0 (importance matrices do not cover it) and vectors are F32. llama-quantize
weighs errors by an importance matrix of library source that is not held out. The folder
``widened`` gets every file once more in float32, decoded by llama-quantize.
"""

from __future__ import annotations

import in_environment  # noqa: F401 (first of all: what follows is in .venv)

# isort: split
import argparse
import subprocess
from pathlib import Path

import numpy as np
from demo_corpus import sources

from oxillama_torch import read_gguf
from oxillama_torch.config import demo_model_path
from oxillama_torch.gguf.reader import GGUFFile
from oxillama_torch.gguf.writer import ENCODABLE, write_gguf
from oxillama_torch.kernels import formats

# GGML type -> the name llama-quantize has for a file of it.
FILE_TYPES = {
    "Q2_K": "Q2_K", "Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S", "Q6_K": "Q6_K",
    "IQ1_S": "IQ1_S", "IQ1_M": "IQ1_M", "IQ2_XXS": "IQ2_XXS", "IQ2_XS": "IQ2_XS", "IQ2_S": "IQ2_M",
    "IQ3_XXS": "IQ3_XXS", "IQ3_S": "IQ3_S", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS",
    "Q1_0": "Q1_0", "Q2_0": "Q2_0", "NVFP4": "Q8_0",
}  # fmt: skip
# Types that llama-quantize has no file type for, only a type of single tensors.
BY_TENSOR = ("NVFP4",)
EMBEDDING = "token_embd.weight"
UNQUANTIZED = ("F32", "F16", "BF16")
CALIBRATION_BYTES = 200_000


def write_encodable(model: GGUFFile, folder: Path) -> None:
    """A file for each type that gguf-py encodes."""
    values = {
        name: formats.dequantize(info.type, model.data(name)).view(info.shape).numpy()
        for name, info in model.tensors.items()
    }
    for type_name in sorted(ENCODABLE):
        tensors = {
            name: (array, _type_of(name, array, type_name)) for name, array in values.items()
        }
        write_gguf(folder / f"{type_name}.gguf", model.metadata, tensors)
        print(type_name, flush=True)


def _type_of(name: str, array: np.ndarray, type_name: str) -> str:
    if array.ndim == 1:
        return "F32"
    return "Q8_0" if name == EMBEDDING and type_name not in UNQUANTIZED else type_name


def write_with_tools(folder: Path, tools: Path) -> None:
    """A file for each type that llama-quantize encodes, from the F32 file in ``folder``."""
    base, text, matrix = folder / "F32.gguf", folder / "calibration.txt", folder / "imatrix.gguf"
    material = "\n".join(source for _, source in sources()[::10])
    text.write_text(material[:CALIBRATION_BYTES], encoding="utf-8")
    command = [tools / "llama-imatrix", "-m", base, "-f", text, "-o", matrix, "-c", "512"]
    _run([*command, "--parse-special", "-t", "2"])
    for type_name, file_type in FILE_TYPES.items():
        out = folder / f"{type_name}.gguf"
        options = ["--imatrix", matrix, "--pure", "--token-embedding-type", "q8_0"]
        if type_name in BY_TENSOR:
            options += ["--tensor-type", f"blk={type_name.lower()}"]
        _run([tools / "llama-quantize", *options, base, out, file_type])
        print(type_name, flush=True)


def widen(folder: Path, tools: Path) -> None:
    """Each file once more in ``widened``, in float32 as llama.cpp decodes it."""
    (folder / "widened").mkdir(exist_ok=True)
    for path in sorted(folder.glob("*.gguf")):
        if path.stem != "imatrix":
            out = folder / "widened" / path.name
            _run([tools / "llama-quantize", "--allow-requantize", path, out, "F32"])


def _run(command: list[str | Path]) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")


def check(folder: Path) -> None:
    """Say which files hold something else than their names say."""
    for path in sorted(folder.glob("*.gguf")):
        with read_gguf(path) as model:
            layers = (info for name, info in model.tensors.items() if name.startswith("blk."))
            others = {info.type.name for info in layers if len(info.shape) > 1} - {path.stem}
        if others and path.stem != "imatrix":
            print(f"{path.name} holds {', '.join(sorted(others))}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, default=demo_model_path(), help="GGUF file")
    parser.add_argument("--tools", type=Path, help="folder of llama-quantize and llama-imatrix")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with read_gguf(options.model) as model:
        write_encodable(model, options.folder)
    if options.tools is not None:
        write_with_tools(options.folder, options.tools)
        widen(options.folder, options.tools)
    check(options.folder)


if __name__ == "__main__":
    main()
