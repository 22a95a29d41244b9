"""Mixture of experts: each token goes through the few experts its router prefers.

T tokens, D hidden size, F intermediate size of an expert, E experts, K experts per token.
"""

from __future__ import annotations

from torch import Tensor, nn

from oxillama_torch.kernels.activation.op import gated
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul.op import quant_matmul_experts
from oxillama_torch.layers.linear import QuantLinear
from oxillama_torch.layers.lora import AdapterBatch

__all__ = ["MixtureOfExperts"]


class MixtureOfExperts(nn.Module):
    """``y = sum over chosen experts e of p_e * W_down,e (activation(W_gate,e x) * W_up,e x)``.

    The sum runs over a token's experts in the order of their indices, so that its rounding does
    not depend on the other tokens.

    Args:
        router: D -> E, its softmax gives p (Jiang et al. 2024, Mixtral).
        gate_up: one packed stack of shape (E * 2F, D), of each expert first the gate and then up,
            or two of shape (E * F, D).
        down: packed stack of shape (E * D, F).
        num_experts: E.
        num_chosen: K.
        normalize: divide the chosen p by their sum.
        scale: factor of the chosen p.
        activation: ``silu``, ``gelu`` or ``gelu_tanh``.
        name: of the layer in the file, such as ``blk.0``.
        numerics: ``"invariant"`` or ``"fast"``.

    Attributes:
        stacks: names in the file of gate, up and down, such as ``blk.0.ffn_gate_exps``.
    """

    def __init__(
        self,
        *,
        router: QuantLinear,
        gate_up: list[PackedTensor],
        down: PackedTensor,
        num_experts: int,
        num_chosen: int,
        normalize: bool,
        scale: float,
        activation: str,
        name: str = "",
        numerics: str = "invariant",
    ) -> None:
        super().__init__()
        self.router = router
        self.gate_up, self.down = gate_up, down
        self.stacks = tuple(f"{name}.ffn_{part}_exps" for part in ("gate", "up", "down"))
        self.num_experts, self.num_chosen = num_experts, num_chosen
        self.normalize, self.scale = normalize, scale
        self.activation = activation
        self.numerics = numerics

    def forward(self, x_TD: Tensor, adapters: AdapterBatch | None = None) -> Tensor:
        expert_ids_TK, weights_TK = self.route(x_TD, adapters)
        ids_R = expert_ids_TK.flatten()  # R = T * K rows
        x_RD = x_TD.repeat_interleave(self.num_chosen, dim=0)
        both = [self._experts(x_RD, weight, ids_R) for weight in self.gate_up]
        gate_RF, up_RF = both if len(both) == 2 else both[0].chunk(2, dim=1)
        if adapters is not None:
            self._adapt(adapters, gate_RF, x_RD, ids_R, self.stacks[0])
            self._adapt(adapters, up_RF, x_RD, ids_R, self.stacks[1])
        hidden_RF = gated(gate_RF, up_RF, self.activation, numerics=self.numerics)
        y_RD = self._experts(hidden_RF, self.down, ids_R)
        if adapters is not None:
            self._adapt(adapters, y_RD, hidden_RF, ids_R, self.stacks[2])
        y_TKD = y_RD.unflatten(0, (-1, self.num_chosen))
        return _sum_in_order(y_TKD.float() * weights_TK[:, :, None]).to(x_TD.dtype)

    def route(self, x_TD: Tensor, adapters: AdapterBatch | None = None) -> tuple[Tensor, Tensor]:
        """Chosen experts, int64 [T, K] ascending, and their weights, float32 [T, K]."""
        probabilities_TE = self.router(x_TD.float(), adapters).softmax(dim=-1)
        # a stable sort settles ties by index, which topk leaves open
        ranked_TE = probabilities_TE.argsort(dim=-1, descending=True, stable=True)
        expert_ids_TK = ranked_TE[:, : self.num_chosen].sort(dim=-1).values
        weights_TK = probabilities_TE.gather(1, expert_ids_TK)
        if self.normalize:
            weights_TK = weights_TK / _sum_in_order(weights_TK)[:, None]
        return expert_ids_TK, weights_TK if self.scale == 1.0 else weights_TK * self.scale

    def _experts(self, x: Tensor, weight: PackedTensor, ids_R: Tensor) -> Tensor:
        return quant_matmul_experts(x, weight, ids_R, self.num_experts, numerics=self.numerics)

    def _adapt(
        self, adapters: AdapterBatch, y_RN: Tensor, x_RK: Tensor, ids_R: Tensor, stack: str
    ) -> None:
        adapters.add_experts(
            y_RN, x_RK, ids_R, stack, self.num_experts, self.num_chosen, self.numerics
        )

    def stack(self, name: str) -> tuple[PackedTensor, int, int]:
        """Where a stack of ``stacks`` stands: a tensor, its first row there, rows per expert."""
        gate, up, down = self.stacks
        if name == down:
            weight, first, parts = self.down, 0, 1
        elif len(self.gate_up) == 2:
            weight, first, parts = self.gate_up[name == up], 0, 1
        else:
            weight, first, parts = self.gate_up[0], int(name == up), 2
        step = weight.shape[0] // self.num_experts
        return weight, first * step // parts, step

    def shape(self, name: str) -> tuple[int, int, int]:
        """(E, N, K) of a stack of ``stacks``."""
        weight, _, step = self.stack(name)
        fused = name != self.stacks[2] and len(self.gate_up) == 1
        return self.num_experts, step // 2 if fused else step, weight.shape[1]

    def extra_repr(self) -> str:
        return f"{self.num_chosen} of {self.num_experts} experts, {self.down.type_name}"


def _sum_in_order(x_TK: Tensor) -> Tensor:
    """Sum over the second dimension, first to last: ``sum`` may add in an order that T decides."""
    total_T = x_TK[:, 0]
    for chosen in range(1, x_TK.shape[1]):
        total_T = total_T + x_TK[:, chosen]
    return total_T
