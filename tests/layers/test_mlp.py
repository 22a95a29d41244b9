"""The gated feed-forward layer. Oracle: its formula in float32 torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.layers.linear import LinearGroup, QuantLinear
from oxillama_torch.layers.mlp import GatedMLP

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "one-product"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_formula(activation, fused):
    gate, up, down = (torch.randn(n, k) / k**0.5 for n, k in ((50, 24), (50, 24), (24, 50)))
    if fused:
        gate_up = [linear(torch.cat([gate, up]), {"gate": 50, "up": 50})]
    else:
        gate_up = [linear(gate), linear(up)]
    mlp = GatedMLP(gate_up=LinearGroup(gate_up), down=linear(down), activation=activation)
    x = torch.randn(9, 24)
    wanted = (ACTIVATIONS[activation](x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(mlp(x), wanted)


def linear(values: torch.Tensor, parts: dict[str, int] | None = None) -> QuantLinear:
    data = values.view(torch.uint8).flatten()
    return QuantLinear(PackedTensor.from_bytes("F32", data, tuple(values.shape)), parts=parts)
