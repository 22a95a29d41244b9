"""Compile tile decoders for GPUs that are not here.

``python -m tests.support.compile_tiles TYPE...`` prints a line per type and GPU: type, compute
capability, bytes of stack and local memory, which are not 0 when registers were spilled.
A process of its own, because Triton decides when it is imported whether kernels are interpreted.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from oxillama_torch.kernels import formats
from tests.support.tile_kernel import decode_kernel

CAPABILITIES = (80, 90, 100, 120)
POINTERS = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.uint8: "*u8", torch.int8: "*i8", torch.int32: "*i32",
}  # fmt: skip


def main(names: list[str]) -> None:
    for name in names:
        format = formats.get(name)
        blocks = torch.zeros(1, 256 // format.block_weights, format.block_bytes, dtype=torch.uint8)
        pointers = [POINTERS[plane.dtype] for plane in format.repack(blocks).values()]
        pointers += pointers[:1] * (4 - len(pointers))
        constants = {"DECODE": format.decode_tile, "BLOCK_N": 16, "BLOCK_K": 64, "FAR": False}
        signature = {
            "out": "*fp32",
            **{f"p{i}": pointer for i, pointer in enumerate(pointers)},
            **dict.fromkeys(["s0", "s1", "s2", "s3", "N", "K"], "i32"),
            **dict.fromkeys(constants, "constexpr"),
        }
        for capability in CAPABILITIES:
            source = ASTSource(decode_kernel, signature, constants)
            # The fusion default is about to change in Triton, which warns unless it is given.
            kernel = compile(
                source,
                target=GPUTarget("cuda", capability, 32),
                options={"enable_fp_fusion": False},
            )
            print(name, capability, *local_memory(kernel.asm["cubin"]))


def local_memory(cubin: bytes) -> tuple[int, int]:
    """Bytes of stack and of local memory per thread, by the cuobjdump that ships with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    match = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert match, usage
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    main(sys.argv[1:])
