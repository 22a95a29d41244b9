"""Rotary position embedding (Su et al. 2021) and the ways of stretching it to longer contexts.

T tokens, Hq query heads, Hkv key/value heads, D head size, R rotated dimensions (R <= D).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from oxillama_torch.kernels.rope.op import rope_store_kv

__all__ = ["HeadNorms", "RopeConfig", "RotaryEmbedding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Angles of the rotation, in the terms of GGUF metadata (``<arch>.rope.*``).

    Args:
        style: which dimensions pair up: ``norm`` (2i, 2i+1) or ``neox`` (i, i + R/2).
        dim: R, even.
        theta: base of the frequencies.
        scaling: ``none``, ``linear`` (positions divided by ``factor``) or ``yarn``
            (Peng et al. 2023: high frequencies kept, low ones divided, a ramp in between).
        factor: how much longer than trained.
        original_context: tokens of the training context; yarn's ramp is measured in it.
        beta_fast, beta_slow: rotations within ``original_context`` where the ramp begins and ends.
        attn_factor: further factor of cos and sin.
        log_multiplier: yarn's ``mscale_all_dim``; 0 where the file does not speak of it.
    """

    style: str
    dim: int
    theta: float
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attn_factor: float = 1.0
    log_multiplier: float = 0.0

    def inverse_frequencies(self, freq_factors: Tensor | None = None) -> Tensor:
        """Radians per position of each rotated pair, float32 [R/2].

        Args:
            freq_factors: float32 [R/2], divisors from the file's ``rope_freqs.weight`` (Llama 3).
        """
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        plain = 1.0 / self.theta**exponents
        if freq_factors is not None:
            plain = plain / freq_factors
        if self.scaling == "none":
            return plain
        stretched = plain / self.factor
        if self.scaling == "linear":
            return stretched
        kept = self._ramp()
        return stretched * (1 - kept) + plain * kept

    def mscale(self) -> float:
        """Factor of cos and sin: yarn's correction of the attention's temperature."""
        if self.scaling != "yarn":
            return self.attn_factor
        if self.log_multiplier == 0:
            return self.attn_factor * _temperature(self.factor, 1.0)
        ratio = _temperature(self.factor, 1.0) / _temperature(self.factor, self.log_multiplier)
        return self.attn_factor * ratio

    def _ramp(self) -> Tensor:
        """1 where a pair turns often enough to be kept, 0 where it is stretched, [R/2]."""
        low = max(math.floor(self._pair_with_rotations(self.beta_fast)), 0)
        high = min(math.ceil(self._pair_with_rotations(self.beta_slow)), self.dim - 1)
        pairs = torch.arange(self.dim // 2, dtype=torch.float32)
        return 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)

    def _pair_with_rotations(self, rotations: float) -> float:
        """The (fractional) pair that turns ``rotations`` times within the original context."""
        wavelength = self.original_context / (rotations * 2 * math.pi)
        return self.dim * math.log(wavelength) / (2 * math.log(self.theta))


def _temperature(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


class HeadNorms(NamedTuple):
    """Weights of the norms of each query and key head, float32 [D] each, and their epsilon."""

    q: Tensor
    k: Tensor
    eps: float


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys, normed before if asked to, and stores keys and values in pages.

    Args:
        config: the angles.
        freq_factors: see :meth:`RopeConfig.inverse_frequencies`; on the CPU.
        device: where the frequencies go.
        numerics: ``"invariant"`` or ``"fast"``.
    """

    def __init__(
        self,
        config: RopeConfig,
        freq_factors: Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
        numerics: str = "invariant",
    ) -> None:
        super().__init__()
        self.style = config.style
        self.mscale = config.mscale()
        self.numerics = numerics
        self.register_buffer("inv_freq", config.inverse_frequencies(freq_factors).to(device))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        kv: tuple[Tensor, Tensor],
        slot_mapping: Tensor,
        norms: HeadNorms | None = None,
    ) -> Tensor:
        """Write rotated k and v to ``kv``; return rotated q.

        Args:
            q: [T, Hq, D];  k: [T, Hkv, D];  v: [T, Hkv, Dv].
            positions: int64 [T], index of each token in its request.
            kv: pages of keys and of values, [P, S, Hkv, D] and [P, S, Hkv, Dv].
            slot_mapping: int64 [T], page * S + offset; -1: not stored.
            norms: of each head of q and k before the rotation.
        """
        k_pages, v_pages = kv
        q_norm, k_norm, eps = (None, None, 0.0) if norms is None else norms
        return rope_store_kv(
            q, k, v, positions, self.inv_freq, self.mscale, self.style,
            k_pages, v_pages, slot_mapping,
            q_norm=q_norm, k_norm=k_norm, norm_eps=eps, numerics=self.numerics,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.style}, {2 * len(self.inv_freq)} dimensions, mscale={self.mscale:g}"
