"""Probabilities as integers, so that sums have the same bits in whatever order a device adds.

Floating addition is not associative: ``torch.sum`` and ``torch.cumsum`` split long rows over
threads or blocks depending on how many rows there are, and a row's sum then depends on its
neighbours (seen with ``torch.sum`` at 151,936 columns on a CPU). Integers add exactly. Weights are

    w = round(exp(x - max x) * 2**43)

so the likeliest token weighs 2**43, a row of up to 2**19 tokens cannot overflow int64, and what is
below 2**-44 of the likeliest token's probability counts as impossible.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import torch

__all__ = ["MAX_VOCABULARY", "ONE", "ordered_keys", "steady_sum", "weights"]

#: The weight of the likeliest token.
ONE = 1 << 43

#: ``MAX_VOCABULARY * ONE`` still fits an int64.
MAX_VOCABULARY = 1 << 19


def weights(x: torch.Tensor, peak: torch.Tensor, *, in_place: bool = False) -> torch.Tensor:
    """``round(exp(x - peak) * 2**43)``.

    Args:
        x: float32 [R, V].
        peak: float32 [R, 1], the maximum of each row.
        in_place: ``x`` may be overwritten.

    Returns: int64 [R, V].
    """
    assert x.shape[-1] <= MAX_VOCABULARY, f"vocabulary of {x.shape[-1]} would overflow"
    below = x.sub_(peak) if in_place else x.sub(peak)
    return below.exp_().mul_(ONE).round_().to(torch.int64)


def ordered_keys(x: torch.Tensor) -> torch.Tensor:
    """Distinct integers that sort like the values, equal values by lower column first.

    ``torch.topk`` promises no order among equal values; among distinct keys there is only one. The
    column comes back as ``torch.topk``'s index.

    Args:
        x: float32 [R, V] without NaN.

    Returns: int64 [R, V]; the larger, the likelier.
    """
    # Adding zero turns -0.0 into 0.0; flipping the magnitude bits of negative floats makes their
    # bit patterns sort as integers.
    bits = x.add(0.0).view(torch.int32)
    ordered = bits.bitwise_xor(bits.bitwise_right_shift(31).bitwise_and_(0x7FFFFFFF))
    columns = torch.arange(x.shape[-1] - 1, -1, -1, device=x.device)
    return ordered.to(torch.int64).bitwise_left_shift_(32).bitwise_or_(columns)


def steady_sum(x: torch.Tensor) -> torch.Tensor:
    """Row sums of floats whose bits depend on nothing but the row.

    The upper half of the columns is added to the lower half until one is left: every addition is
    elementwise, so neither threads nor the number of rows decide what is added to what. Columns
    of zeros at the end change nothing.

    Args:
        x: float [R, C].

    Returns: float [R].
    """
    width = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[:, :width] + x[:, width:]
    return x[:, 0]
