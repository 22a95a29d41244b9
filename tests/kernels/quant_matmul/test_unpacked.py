"""kernels/quant_matmul/unpacked.py. Oracle: gguf-py's dequantize."""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.kernels.quant_matmul import unpacked


@pytest.mark.parametrize("type_name", sorted(unpacked.TYPES))
def test_bytes_and_scales_are_the_weights_bit_for_bit(type_name, pack):
    """More rows than are unpacked at once."""
    weight, values = pack(type_name, 1026, 512)
    assert unpacked.name_of(weight) == type_name
    unpacked.unpack(weight)
    name = unpacked.name_of(weight)
    form, fields = unpacked.FORMS[name], unpacked.fields_of(weight)
    assert fields["q"].dtype == torch.int8
    bits = sum(x.nbytes for x in fields.values()) * 8 / (1026 * 512)
    assert bits <= 12
    [part] = form.decode(**form.scale(**fields))
    assert part.shape == (1026, 2, 8, 32)
    assert torch.equal(part.reshape(1026, 512), values.float())


def test_bytes_go_with_the_weight(pack):
    weight, _ = pack("Q6_K", 16, 256)
    unpacked.unpack(weight)
    before = len(unpacked._unpacked)
    del weight
    assert len(unpacked._unpacked) == before - 1


def test_fast_types_stay_as_they_are(pack):
    weight, _ = pack("Q4_K", 16, 256)
    unpacked.unpack(weight)
    assert unpacked.name_of(weight) == "Q4_K"
    assert set(unpacked.fields_of(weight)) == set(weight.planes)
