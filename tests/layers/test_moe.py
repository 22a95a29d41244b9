"""Mixture of experts. Oracle: every expert on every token in float64, weighted afterwards."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from oxillama_torch.kernels.formats import PackedTensor
from oxillama_torch.layers.linear import QuantLinear
from oxillama_torch.layers.moe import MixtureOfExperts

EXPERTS, CHOSEN, HIDDEN, WIDE = 6, 3, 20, 14


def packed(values: torch.Tensor) -> PackedTensor:
    values = values.flatten(0, -2)
    data = values.contiguous().view(torch.uint8).flatten()
    return PackedTensor.from_bytes("F32", data, tuple(values.shape))


class Weights:
    def __init__(self) -> None:
        self.router = torch.randn(EXPERTS, HIDDEN)
        self.gate = torch.randn(EXPERTS, WIDE, HIDDEN)
        self.up = torch.randn(EXPERTS, WIDE, HIDDEN)
        self.down = torch.randn(EXPERTS, HIDDEN, WIDE)

    def layer(self, *, fused: bool = True, **options) -> MixtureOfExperts:
        apart = [packed(self.gate), packed(self.up)]
        together = [packed(torch.cat([self.gate, self.up], dim=1))]
        settings = {"normalize": True, "scale": 1.0, **options}
        return MixtureOfExperts(
            router=QuantLinear(packed(self.router)),
            gate_up=together if fused else apart,
            down=packed(self.down),
            num_experts=EXPERTS,
            num_chosen=CHOSEN,
            activation="silu",
            **settings,
        )

    def dense(self, x, *, normalize=True, scale=1.0):
        x, router, gate, up, down = (
            t.double() for t in (x, self.router, self.gate, self.up, self.down)
        )
        probabilities = (x @ router.T).softmax(-1)
        chosen = probabilities.topk(CHOSEN).indices
        kept = torch.zeros_like(probabilities).scatter(1, chosen, 1.0) * probabilities
        if normalize:
            kept = kept / kept.sum(-1, keepdim=True)
        hidden = functional.silu(torch.einsum("td,efd->tef", x, gate))
        hidden = hidden * torch.einsum("td,efd->tef", x, up)
        outputs = torch.einsum("tef,edf->ted", hidden, down)
        return (outputs * kept[:, :, None]).sum(1).float() * scale


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="normalized"),
        pytest.param({"normalize": False}, id="as-they-are"),
        pytest.param({"normalize": False, "scale": 2.5}, id="scaled"),
    ],
)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "one-product"])
def test_equals_dense_mixture(options, fused):
    weights, x = Weights(), torch.randn(11, HIDDEN)
    got = weights.layer(fused=fused, **options)(x)
    torch.testing.assert_close(got, weights.dense(x, **options), rtol=1e-4, atol=1e-5)


def test_a_token_does_not_feel_the_others():
    layer, x = Weights().layer(), torch.randn(40, HIDDEN)
    together = layer(x)
    for row in range(40):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])
    assert torch.equal(layer(x.flip(0)).flip(0), together)
    assert layer(x[:0]).shape == (0, HIDDEN)


def test_ties_go_to_the_lower_index():
    weights = Weights()
    weights.router[:] = weights.router[0]
    expert_ids, shares = weights.layer().route(torch.randn(5, HIDDEN))
    assert (expert_ids == torch.tensor([0, 1, 2])).all()
    torch.testing.assert_close(shares, torch.full((5, 3), 1 / 3))


def test_bfloat16_tokens_are_routed_in_float32():
    weights = Weights()
    # two experts that bfloat16 scores could not tell apart
    weights.router[1] = weights.router[0] * (1 + 2**-12)
    x = torch.randn(64, HIDDEN).bfloat16()
    expert_ids, _ = weights.layer().route(x)
    wanted = (x.float() @ weights.router.T).topk(CHOSEN).indices.sort(-1).values
    assert torch.equal(expert_ids, wanted)
    assert weights.layer()(x).dtype == torch.bfloat16
