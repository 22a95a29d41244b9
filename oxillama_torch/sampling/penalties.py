"""Repetition, frequency and presence penalties.

    l = l / r if l > 0 else l * r                  for tokens of prompt and output
    l -= frequency * count + presence * (count > 0)    for tokens of the output

With ``repeat_last_n`` both lines are about the last n tokens, prompt and output alike.

Sources: Keskar et al. 2019, arXiv:1909.05858 (repetition); the OpenAI API reference (frequency,
presence); llama.cpp, ``llama_sampler_init_penalties`` (the window).

Shapes: R rows, V vocabulary, E single entries (row, token) to change.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from oxillama_torch.sampling.entries import entry_index

__all__ = ["penalise"]


def penalise(logits: torch.Tensor, rows: Sequence) -> None:
    """Apply the three penalties in place.

    Args:
        logits: float32 [R, V].
        rows: SamplingRow per row, None for rows that are not meant.
    """
    found = [
        (index, row.params, *row.history.penalised())
        for index, row in enumerate(rows)
        if row is not None and row.history is not None
    ]
    found = [entry for entry in found if len(entry[2])]
    if not found:
        return
    sizes = [len(ids) for _, _, ids, _ in found]
    index = entry_index(
        [np.repeat([line for line, *_ in found], sizes)],
        [ids for _, _, ids, _ in found],
        logits.device,
    )
    counts = np.concatenate([counts for *_, counts in found])
    settings = np.array(
        [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for _, p, *_ in found],
        np.float32,
    )
    columns = np.column_stack([np.repeat(settings, sizes, axis=0), counts]).astype(np.float32)
    repetition, frequency, presence, count = torch.from_numpy(columns).to(logits.device).unbind(1)
    values = logits[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * count - presence * (count > 0)
    logits.index_put_(index, values)
