"""oxillama-torch: run GGUF models with packed weights on PyTorch and Triton."""

import os as _os

# How long an OpenMP thread of torch spins before it sleeps, in turns of some 20 ns: about as long
# as the way from one operation to the next. The default is milliseconds, which costs nothing on an
# idle machine and makes every operation wait for a time slice on a busy one (measured with two
# processors and a 1.1 B model: a decoding step of 110 ms idle, beside a busy process 2,300 ms by
# default and 145 to 190 ms so).
_os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# A checkout keeps kernels/ and server/ beside this folder; in a wheel they are inside it. They
# are imported as oxillama_torch.kernels and oxillama_torch.server only (see kernels/README.md).
from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Completion",
    "SamplingParams",
    "__version__",
    "read_gguf",
    "register_processor",
]

_HOMES = {
    "LLM": "oxillama_torch.llm",
    "Completion": "oxillama_torch.completion",
    "SamplingParams": "oxillama_torch.sampling.params",
    "read_gguf": "oxillama_torch.gguf.reader",
    "register_processor": "oxillama_torch.sampling.custom",
}


def __getattr__(name: str) -> object:
    """Public names are imported when they are first used: ``--help`` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
