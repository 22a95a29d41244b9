"""What this device can do at best, measured on the spot: copying, and multiplying matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oxillama_torch.bench.timing import measure

__all__ = ["Ceilings", "measure_ceilings"]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """``copy`` in bytes per second, read and written together; ``matmul`` in FLOP per second."""

    copy: float
    matmul: float
    matmul_dtype: str


def measure_ceilings(device: torch.device | str) -> Ceilings:
    """Measure copy bandwidth and dense matmul rate, on random data (zeros run faster)."""
    cuda = torch.device(device).type == "cuda"
    nbytes, side = (1 << 30, 8192) if cuda else (1 << 26, 1024)
    dtype = torch.bfloat16 if cuda else torch.float32
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = measure([lambda: target.copy_(source)], device)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    matmul = measure([lambda: a @ b], device)
    return Ceilings(
        2 * nbytes / copy.median, 2 * side**3 / matmul.median, str(dtype).removeprefix("torch.")
    )
