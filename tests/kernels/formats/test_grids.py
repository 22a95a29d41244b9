"""The codebooks of the IQ1, IQ2 and IQ3 types against gguf-py's."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from oxillama_torch.kernels.formats import grids

CPU = torch.device("cpu")
GRIDS = ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]


def oracle(name: str) -> np.ndarray:
    """float32 [E, width]."""
    owner = getattr(gguf.quants, name)
    owner.init_grid()
    return owner.grid.reshape(owner.grid_shape)


@pytest.mark.parametrize("name", GRIDS)
def test_entries_equal_gguf_py(name: str) -> None:
    assert np.array_equal(getattr(grids, name).entries(CPU).numpy(), oracle(name))


@pytest.mark.parametrize("name", GRIDS[1:])
def test_words_hold_a_value_above_128_in_each_byte(name: str) -> None:
    words = getattr(grids, name).words(CPU)
    values = words.view(torch.uint8).view(len(words), -1).float() - 128
    assert np.array_equal(values.numpy(), oracle(name))


def test_crumbs_hold_a_digit_in_two_bits() -> None:
    packed = grids.IQ1_S.crumbs(CPU).numpy().view(np.uint16)
    digits = packed[:, None] >> np.arange(0, 16, 2) & 3
    assert np.array_equal(digits.astype(np.float32) - 1, oracle("IQ1_S"))


def test_the_same_table_is_given_each_time() -> None:
    assert grids.IQ2_S.words(CPU) is grids.IQ2_S.words(CPU)


def test_the_eighth_sign_makes_their_number_even() -> None:
    signs = grids.with_parity(torch.arange(128, dtype=torch.uint8))
    ksigns = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)
    assert np.array_equal(signs.numpy(), ksigns)
