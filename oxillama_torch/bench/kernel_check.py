"""Compare a backend of an op on packed weights with the reference, on fresh random data.

Shapes: M rows, N outputs, K inputs, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oxillama_torch.gguf.types import row_bytes
from oxillama_torch.kernels import formats, registry
from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.kernels.registry import Call, Kernel

__all__ = ["CHECKED_OPS", "Check", "check_kernel", "random_weight"]

CHECKED_OPS = ("embedding", "quant_matmul", "quant_matmul_experts")
_EXPERTS = 3

# Relative L2 error allowed, by dtype of the activations: the rounding of the result, and where
# tensor cores want it, of the weights.
_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Check:
    """Errors of one backend against the reference.

    Args:
        refused: why the backend does not serve the call; the rest is then empty.
        bound: the relative L2 error allowed.
    """

    refused: str | None = None
    max_abs: float = 0.0
    relative_l2: float = 0.0
    cosine: float = 1.0
    nans: int = 0
    bound: float = 0.0

    @property
    def passed(self) -> bool:
        """Served, free of NaN and within the bound."""
        return self.refused is None and not self.nans and self.relative_l2 <= self.bound


def random_weight(type_name: str, rows: int, columns: int) -> PackedTensor:
    """Random blocks whose float16 scales are small positive numbers, or random plain weights."""
    format = formats.get(type_name)
    data = torch.randint(0, 256, (rows * row_bytes(format.type, columns),), dtype=torch.uint8)
    weight = PackedTensor.from_bytes(type_name, data, (rows, columns))
    for plane in weight.planes.values():
        if plane.is_floating_point() and format.block_weights > 1:
            plane.copy_(torch.rand(plane.shape) * 0.01 + 0.001)
        elif plane.is_floating_point():
            plane.copy_(torch.randn(plane.shape))
    return weight


def check_kernel(
    kernel: Kernel, type_name: str, shape: tuple[int, int, int], device: str, dtype: torch.dtype
) -> Check:
    """Run a backend and the reference on the same random operands.

    Args:
        kernel: of one of CHECKED_OPS.
        shape: (M, N, K).
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of the activations.
    """
    rows, outputs, inputs = shape
    call = Call(device, dtype, type=type_name, m=rows)
    reasons = [kernel.refuse(call), kernel.refuse(Call(device, dtype, "fast", type_name, rows))]
    if all(reasons):
        return Check(refused=reasons[0])
    reference = next(k for k, _ in registry.candidates(kernel.op, call) if k.backend == "reference")
    arguments = _arguments(kernel.op, type_name, shape, device, dtype)
    got, wanted = (k.function(*arguments).double() for k in (kernel, reference))
    error = got - wanted
    return Check(
        max_abs=error.abs().max().item(),
        relative_l2=(error.norm() / wanted.norm()).item(),
        cosine=torch.cosine_similarity(got.flatten(), wanted.flatten(), dim=0).item(),
        nans=int(got.isnan().sum()),
        bound=_BOUNDS[dtype],
    )


def _arguments(
    op: str, type_name: str, shape: tuple[int, int, int], device: str, dtype: torch.dtype
) -> tuple:
    rows, outputs, inputs = shape
    experts = _EXPERTS if op == "quant_matmul_experts" else 1
    weight = random_weight(type_name, experts * outputs, inputs).to(device)
    x = torch.randn(rows, inputs, dtype=dtype, device=device)
    if op == "embedding":
        return torch.randint(0, outputs, (rows,), device=device), weight, dtype
    if op == "quant_matmul_experts":
        return x, weight, torch.randint(0, experts, (rows,), device=device), experts
    return x, weight, torch.randn(outputs, device=device)
