"""What the hand-written Triton kernels share: interpreter switches, dtypes, launch device.

With ``TRITON_INTERPRET=1`` Triton runs kernels as numpy on CPU tensors. That is how they are
tested without a GPU, and it has limits which kernels meet through these switches: ``tl.dot`` on
bfloat16 is wrong in the interpreter of Triton 3.6, and inline assembly is not interpreted at all.
Kernels can also be compiled without a GPU: see ``oxillama_torch.bench.cross_compile``.

Programmatic dependent launch (``OXILLAMA_PDL=1``, sm_90 and later): a kernel may be put on the
multiprocessors, and do what needs no input, while the one before it still runs. Why no result
depends on it, in the terms of PTX's ``griddepcontrol``:

1. ``wait`` returns once the kernels before have ended and their writes are visible.
2. Every program of every kernel with the switch waits before it touches global memory, reads and
   writes alike. So a kernel that has ended was preceded by the end of all before it, however long
   the chain: neither can a read come too early, nor a write into memory that is still being read.
3. Dependents are let in after the wait, hence no more than two kernels overlap, and a dependent
   takes no place that a program of the earlier one is still to have: it enters when all of those
   are running or done. By 2 it does not matter that they have yet to write.
   Before the wait a matmul prefetches the first weights of its program into the L2 cache. That
   gives no register a value, and the cache is where all writes of a GPU go: what is loaded after
   the wait is what is there then.
4. Kernels without the switch (torch's, cuBLAS's, copies) start when all before them has ended, and
   what comes after them waits for their end: they never let dependents in.

A test reads 2 off the SASS: nothing that loads or stores stands before the wait, matmuls prefetch.
"""

from __future__ import annotations

import contextlib
import functools
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from oxillama_torch.config import environment

__all__ = [
    "DEVICES",
    "INTERPRET",
    "Variant",
    "dot_dtype",
    "launch_device",
    "multiprocessors",
    "pdl_begin",
    "pdl_options",
    "pdl_prefetch",
    "priority",
    "triton_dtype",
]

# Fused multiply-add is Triton's default up to 3.9 and not after it; 3.9 warns at every compilation
# that leaves it open. Said here, results do not change with Triton's version.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Whether kernels are interpreted; fixed when a kernel is decorated, so fixed per process.
INTERPRET: bool = triton.knobs.runtime.interpret

# Devices that a Triton backend serves.
DEVICES: tuple[str, ...] = ("cuda", "cpu") if INTERPRET else ("cuda",)

_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def priority(rank: int) -> int:
    """Priority of a Triton backend: above the reference on a GPU, below it when interpreted.

    Args:
        rank: order among the Triton backends of an op, 0 to 9; the highest wins.
    """
    return rank - 100 if INTERPRET else rank + 100


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """The Triton dtype of a torch floating dtype."""
    return _TRITON_DTYPES[dtype]


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Dtype of the operands of ``tl.dot`` for activations of ``dtype``.

    float32 operands go with ``input_precision="ieee"``, which other dtypes ignore.
    """
    return tl.float32 if INTERPRET else _TRITON_DTYPES[dtype]


def launch_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Context in which Triton launches on the device of ``tensor``, not on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the CPU, where programs run one by one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def pdl_begin(USE: tl.constexpr):
    """Wait for the kernels before, then let the next one in; before any use of global memory."""
    if USE:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def pdl_prefetch(plane, stride, first, N, BLOCK_N: tl.constexpr, USE: tl.constexpr):
    """Ask for the first 512 bytes of rows of a weight's plane, before ``pdl_begin``.

    Weights are not what the kernels before write, so they may be on their way while those run.

    Args:
        plane: pointer, [N, ...] with row ``stride`` in elements.
        first: int64, first of BLOCK_N rows; those from N on ask for the last one again.
    """
    if USE:
        rows = tl.minimum(first + tl.arange(0, BLOCK_N), N - 1)
        LINE: tl.constexpr = 128 // (plane.dtype.element_ty.primitive_bitwidth // 8)
        at = plane + (rows * stride)[:, None] + (tl.arange(0, 4) * LINE)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], tl.int32, False, 1
        )


@functools.cache
def pdl_options(device: torch.device) -> dict[str, bool]:
    """Keyword arguments by which kernels are launched with dependent launch, or without.

    Without, unless ``OXILLAMA_PDL=1``: it has not been timed yet.
    """
    wanted = environment("PDL") == "1" and device.type == "cuda" and not INTERPRET
    if not wanted or torch.cuda.get_device_capability(device) < (9, 0):
        return {"USE_PDL": False}
    if not hasattr(tl.extra.cuda, "gdc_wait"):
        return {"USE_PDL": False}
    return {"USE_PDL": True, "launch_pdl": True}


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is compiled, for counting its instructions without a GPU.

    Args:
        name: such as ``"gemv-q4_k-bf16"``.
        kernel: the ``@triton.jit`` function.
        arguments: runtime argument -> Triton type: ``"*bf16"``, ``"*u8"``, ``"i32"``, ``"fp32"``.
        constants: constexpr argument -> value.
        aligned: runtime arguments that are multiples of 16, as a launch finds by itself: pointers
            from torch's allocator, and most sizes.
        num_warps, num_stages: launch options.
        weights: weights that one program decodes in one turn of its hot loop; 0 when it has none.
    """

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    weights: int = 0
