"""Every step of sampling stated once more, for one row, in plain numpy float64.

Written from the definitions (papers and API references named in ``sampling``), not from the code.
"""

from __future__ import annotations

import numpy as np

from oxillama_torch.sampling.params import SamplingParams

__all__ = ["adjusted", "distribution", "log_softmax"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def adjusted(logits, params: SamplingParams, prompt, output, end_ids=()) -> np.ndarray:
    """Logits after bias, bans and penalties."""
    out = np.array(logits, np.float64)
    for token_id, bias in params.logit_bias.items():
        out[token_id] += bias
    if len(output) < params.min_tokens:
        out[list(end_ids)] = -np.inf
    for token_id in set(prompt) | set(output):
        factor = params.repetition_penalty
        out[token_id] = out[token_id] / factor if out[token_id] > 0 else out[token_id] * factor
    for token_id in set(output):
        count = list(output).count(token_id)
        out[token_id] -= params.frequency_penalty * count + params.presence_penalty
    return out


def distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities after temperature, top-k, top-p, min-p; equal logits rank by lower id."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if params.temperature == 0:
        return np.eye(len(logits))[order[0]]
    probabilities = np.exp(log_softmax(logits / params.temperature))
    kept = order[: params.top_k] if params.top_k else order
    share = probabilities[kept] / probabilities[kept].sum()
    nucleus = 1 + int(np.searchsorted(np.cumsum(share), params.top_p))
    kept = [i for i in kept[:nucleus] if probabilities[i] >= params.min_p * probabilities.max()]
    result = np.zeros(len(logits))
    result[kept] = probabilities[kept] / probabilities[kept].sum()
    return result
