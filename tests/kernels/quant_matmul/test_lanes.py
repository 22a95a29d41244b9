"""kernels/quant_matmul/lanes.py. Oracle: gguf-py's dequantize."""

from __future__ import annotations

import pytest
import torch

from oxillama_torch.kernels.quant_matmul.lanes import LANES


@pytest.mark.parametrize("type_name", LANES)
def test_stacked_parts_are_the_weights_bit_for_bit(type_name, pack):
    weight, values = pack(type_name, 3, 1024)
    form, widths = LANES[type_name], weight.format.fields
    fields = {name: p.unflatten(1, (-1, widths[name])) for name, p in weight.planes.items()}
    parts = form.decode(**form.scale(**fields))
    steps = weight.format.block_weights // (form.parts * form.lanes)
    blocks = 1024 // weight.format.block_weights
    assert [part.shape for part in parts] == [(3, blocks, steps, form.lanes)] * form.parts
    assert torch.equal(torch.stack(parts, -2).reshape(3, 1024), values.float())
