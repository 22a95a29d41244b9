"""oxillama-torch: run GGUF models with packed weights on PyTorch and Triton."""

# A checkout keeps kernels/ and server/ beside this folder; in a wheel they are inside it. They
# are imported as oxillama_torch.kernels and oxillama_torch.server only (see kernels/README.md).
from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"
