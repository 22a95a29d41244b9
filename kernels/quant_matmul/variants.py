"""The compiled forms of the matmul and embedding kernels, and what each may cost.

``oxillama_torch.bench.cross_compile`` compiles these for GPUs that are not there; a test holds them
to the budgets below.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from oxillama_torch.kernels import formats
from oxillama_torch.kernels.embedding import triton_embedding
from oxillama_torch.kernels.formats.base import MAX_PLANES, Format
from oxillama_torch.kernels.quant_matmul import configs, triton_quantize
from oxillama_torch.kernels.quant_matmul.dp4a_units import UNITS
from oxillama_torch.kernels.quant_matmul.triton_dp4a import dp4a_kernel
from oxillama_torch.kernels.quant_matmul.triton_experts import experts_kernel
from oxillama_torch.kernels.quant_matmul.triton_gated_matmul import (
    dp4a_gated_kernel,
    gemm_gated_kernel,
)
from oxillama_torch.kernels.quant_matmul.triton_gemm import gemm_kernel
from oxillama_torch.kernels.quant_matmul.triton_gemv import gemv_kernel
from oxillama_torch.kernels.quant_matmul.triton_segments import (
    dp4a_segments_kernel,
    gemm_segments_kernel,
)
from oxillama_torch.kernels.triton_support import Variant

__all__ = ["BUDGETS", "DP4A_BUDGETS", "variants"]

# Instructions per weight on sm_90 that the hot loops of gemv and gemm16 may have: what was counted
# when they were written, and a tenth more. A better decoder should lower its line. The second is
# with bfloat16 activations, for which some formats decode two weights at a time (formats.pairs).
BUDGETS = {
    "f32": (3.6, 3.8),
    "f16": (3.6, 4.0),
    "bf16": (3.6, 3.8),
    "q8_0": (6.1, 6.0),
    "q8_1": (6.2, 6.1),
    "q8_k": (6.0, 6.0),
    "q4_0": (8.3, 5.1),
    "q4_1": (8.4, 5.3),
    "q5_0": (10.6, 6.4),
    "q5_1": (10.8, 6.4),
    "q4_k": (9.3, 6.0),
    "q5_k": (13.1, 7.1),
    "q6_k": (11.9, 6.3),
    "q2_k": (10.2, 6.6),
    "q3_k": (15.3, 6.5),
    "iq4_nl": (8.8, 7.5),
    "iq4_xs": (9.2, 7.8),
    "iq1_s": (9.3, 10.1),
    "iq1_m": (11.2, 12.0),
    "iq2_xxs": (10.7, 11.6),
    "iq2_xs": (10.7, 11.4),
    "iq2_s": (10.9, 11.7),
    "iq3_xxs": (11.1, 12.0),
    "iq3_s": (11.2, 12.6),
    "mxfp4": (9.1, 6.8),
    "nvfp4": (9.6, 7.4),
    "tq1_0": (14.8, 15.0),
    "tq2_0": (8.7, 5.1),
    "q1_0": (8.1, 6.0),
    "q2_0": (9.0, 6.3),
}
# The same for dp4a. On an H200 a Q4_K weight may cost 4.2 before arithmetic is slower than memory.
DP4A_BUDGETS = {
    "q4_0": 1.3,
    "q4_1": 1.4,
    "q5_0": 2.4,
    "q5_1": 2.5,
    "q8_0": 1.1,
    "q4_k": 1.5,
    "q5_k": 2.4,
    "q6_k": 2.4,
    "q2_k": 2.3,
    "q3_k": 2.6,
    "iq4_nl": 3.1,
    "iq4_xs": 3.3,
}

_INPUTS = 4096  # a row length that every tile divides
# What a kernel of one product has and that of a gated pair has not.
_NOT_GATED = ("bias", "residual", "N", "HAS_BIAS", "HAS_RESIDUAL")

_POINTERS = {
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
}


def variants() -> list[Variant]:
    """Every kernel for every format, with bfloat16 activations and the configs used on a GPU."""
    single = [variant for name in formats.known() for variant in _of_format(formats.get(name))]
    both = _segments(formats.get("Q4_K"), formats.get("Q6_K"))
    return [*single, *_residual(formats.get("Q4_K")), *both, _quantize()]


def _of_format(format: Format) -> list[Variant]:
    gemms = (configs.default("gemm", format, rows) for rows in (16, 32, 64, 128))
    return [
        _variant("gemv", gemv_kernel, format, configs.default("gemv", format, 1)),
        *(_variant(f"gemm{gemm.block_m}", gemm_kernel, format, gemm) for gemm in gemms),
        _variant("experts", experts_kernel, format, configs.default("invariant", format, 1)),
        _embedding(format),
        _gated(format),
        *([_dp4a(format), _gated_dp4a(format)] if format.name in UNITS else ()),
    ]


def _residual(format: Format) -> list[Variant]:
    """Kernels with bias and residual added after the loop, which should cost it nothing."""
    return [
        replace(
            variant,
            name=f"residual-{variant.name}",
            constants=variant.constants | {"HAS_BIAS": True, "HAS_RESIDUAL": True},
        )
        for variant in _of_format(format)
        if variant.name.startswith(("gemv-", "gemm16-", "dp4a-"))
    ]


def _variant(name: str, kernel: Any, format: Format, config: configs.Config) -> Variant:
    block_k = configs.block_k(format, _INPUTS, config.block_k)
    constants = {
        "DECODE": format.decoder("DOT_DTYPE" in kernel.arg_names),
        "DOT_DTYPE": tl.bfloat16,
        "HAS_BIAS": False,
        "HAS_RESIDUAL": False,
        "EVEN_K": True,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
    }
    arguments = {
        **dict.fromkeys(("x", "bias", "residual", "out"), "*bf16"),
        **dict.fromkeys(("x_stride", "M", "N", "K", "E"), "i32"),
        **dict.fromkeys(("order", "tile_expert", "tile_start", "expert_start"), "*i64"),
        **_planes(format),
    }
    used = set(kernel.arg_names)
    return Variant(
        name=f"{name}-{format.name.lower()}",
        kernel=kernel,
        arguments={name: type for name, type in arguments.items() if name in used},
        constants={name: value for name, value in constants.items() if name in used},
        aligned=tuple(name for name in arguments if name in used - {"M", "E"}),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        weights=config.block_n * block_k,
    )


def _embedding(format: Format) -> Variant:
    block_k = configs.block_k(format, _INPUTS, triton_embedding.BLOCK_K)
    arguments = {"ids": "*i64", "out": "*bf16", "T": "i32", "K": "i32", **_planes(format)}
    return Variant(
        name=f"embedding-{format.name.lower()}",
        kernel=triton_embedding.embedding_kernel,
        arguments=arguments,
        constants={
            "DECODE": format.decode_tile,
            "BLOCK_T": triton_embedding.BLOCK_T,
            "BLOCK_K": block_k,
        },
        aligned=tuple(name for name in arguments if name != "T"),
        num_warps=triton_embedding.NUM_WARPS,
    )


def _dp4a(format: Format) -> Variant:
    config = configs.default("dp4a", format, 1)
    unit, unit_weights = UNITS[format.name]
    arguments = {
        **{"x": "*i8", "x_scales": "*fp32", "x_sums": "*fp32"},
        **dict.fromkeys(("bias", "residual", "out"), "*bf16"),
        **{"M": "i32", "N": "i32", "K": "i32"},
        **_planes(format),
    }
    return Variant(
        name=f"dp4a-{format.name.lower()}",
        kernel=dp4a_kernel,
        arguments=arguments,
        constants={
            "UNIT": unit,
            "UNIT_WEIGHTS": unit_weights,
            "USE_ASM": True,
            "HAS_BIAS": False,
            "HAS_RESIDUAL": False,
            "EVEN_K": True,
            "BLOCK_N": config.block_n,
            "BLOCK_U": config.block_k,
        },
        aligned=tuple(name for name in arguments if name != "M"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        weights=config.block_n * config.block_k * unit_weights,
    )


def _gated(format: Format) -> Variant:
    """Two products in one: as many weights again per turn of the loop."""
    gemm = _variant("gated16", gemm_kernel, format, configs.default("invariant", format, 1))
    arguments = {n: t for n, t in gemm.arguments.items() if n not in _NOT_GATED} | {"F": "i32"}
    constants = {n: c for n, c in gemm.constants.items() if n not in _NOT_GATED} | {"KIND": "silu"}
    return replace(
        gemm,
        kernel=gemm_gated_kernel,
        arguments=arguments,
        constants=constants,
        aligned=tuple(name for name in arguments if name != "M"),
        weights=2 * gemm.weights,
    )


def _gated_dp4a(format: Format) -> Variant:
    single = _dp4a(format)
    arguments = {n: t for n, t in single.arguments.items() if n not in _NOT_GATED}
    arguments |= {"F": "i32"}
    constants = {n: c for n, c in single.constants.items() if n not in _NOT_GATED} | {
        "KIND": "silu"
    }
    return replace(
        single,
        name=f"gated-dp4a-{format.name.lower()}",
        kernel=dp4a_gated_kernel,
        arguments=arguments,
        constants=constants,
        aligned=tuple(name for name in arguments if name != "M"),
    )


def _quantize() -> Variant:
    arguments = {"x": "*bf16", "values": "*i8", "scales": "*fp32", "sums": "*fp32"}
    arguments |= {"x_stride": "i32", "K": "i32"}
    return Variant(
        name="quantize",
        kernel=triton_quantize.quantize_kernel,
        arguments=arguments,
        constants={name: getattr(triton_quantize, name) for name in ("GROUP", "BLOCK_GROUPS")},
        aligned=tuple(arguments),
        num_warps=triton_quantize.NUM_WARPS,
    )


def _segments(first: Format, second: Format) -> list[Variant]:
    """Two types in one launch; the loop that is counted is the longer one of the two."""
    name = f"{first.name}-{second.name}".lower()
    gemm = _variant("gemm16", gemm_kernel, first, configs.default("invariant", first, 1))
    dp4a = _dp4a(first)
    tensors = dict.fromkeys(("x", "bias_a", "bias_b", "out_a", "out_b"), "*bf16")
    rest = _two(first, second) | dict.fromkeys(("M", "A", "B", "K"), "i32")
    shared = {"HAS_BIAS_A": False, "HAS_BIAS_B": False}
    gemm_arguments = tensors | {"x_stride": "i32"} | rest
    dp4a_arguments = tensors | {"x": "*i8", "x_scales": "*fp32", "x_sums": "*fp32"} | rest
    units = [UNITS[format.name] for format in (first, second)]
    blocks = [configs.default("dp4a", format, 1).block_n for format in (first, second)]
    return [
        replace(
            gemm,
            name=f"segments16-{name}",
            kernel=gemm_segments_kernel,
            arguments=gemm_arguments,
            constants={k: gemm.constants[k] for k in ("DOT_DTYPE", "BLOCK_M", "BLOCK_N", "BLOCK_K")}
            | {"DECODE_A": first.decoder(True), "DECODE_B": second.decoder(True), **shared},
            aligned=tuple(n for n in gemm_arguments if n != "M"),
        ),
        replace(
            dp4a,
            name=f"segments-dp4a-{name}",
            kernel=dp4a_segments_kernel,
            arguments=dp4a_arguments,
            constants={
                **{"UNIT_A": units[0][0], "UNIT_B": units[1][0]},
                **{"WEIGHTS_A": units[0][1], "WEIGHTS_B": units[1][1]},
                **{"BLOCK_A": blocks[0], "BLOCK_B": blocks[1], "BLOCK_U": 32},
                **{"USE_ASM": True, "EVEN_A": True, "EVEN_B": True, **shared},
            },
            aligned=tuple(n for n in dp4a_arguments if n != "M"),
        ),
    ]


def _two(first: Format, second: Format) -> dict[str, str]:
    """``_planes`` of both, as the kernels for two weights name them."""
    named = {}
    for letter, format in (("a", first), ("b", second)):
        for name, type in _planes(format).items():
            prefix = letter if name.startswith("p") else f"s{letter}"
            named[f"{prefix}{name[1:]}"] = type
    return named


def _planes(format: Format) -> dict[str, str]:
    """Pointer and stride types of a format's planes, as ``PackedTensor.tile_args`` gives them."""
    block = torch.zeros(1, 1, format.block_bytes, dtype=torch.uint8)
    types = [_POINTERS[plane.dtype] for plane in format.repack(block).values()]
    types += types[:1] * (MAX_PLANES - len(types))
    if format.table is not None:
        types[-1] = _POINTERS[format.table(torch.device("cpu")).dtype]
    return {
        **{f"p{i}": type for i, type in enumerate(types)},
        **{f"s{i}": "i32" for i in range(MAX_PLANES)},
    }
