"""The weights that kernels are checked and timed with."""

from __future__ import annotations

import pytest

from oxillama_torch.bench.cases import random_weight
from oxillama_torch.kernels import formats


@pytest.mark.parametrize("type_name", formats.known())
def test_random_weights_are_of_ordinary_size(type_name):
    values = random_weight(type_name, 16, 1024).dequantize()
    assert 1e-3 < values.std() < 20
    assert values.isfinite().all()
