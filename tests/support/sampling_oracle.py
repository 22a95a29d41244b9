"""Every step of sampling stated once more, for one row, in plain numpy float64.

Written from the definitions (papers and API references named in ``sampling``), not from the code.
A step takes logits, minus infinity for what has been dropped, and gives logits back.
"""

from __future__ import annotations

import numpy as np

from oxillama_torch.sampling.params import SamplingParams

__all__ = ["STEPS", "adjusted", "distribution", "dry", "log_softmax", "penalised", "softmax"]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(logits))


def penalised(out: np.ndarray, params: SamplingParams, prompt, output) -> np.ndarray:
    """The three penalties."""
    out = out.copy()
    if params.repeat_last_n is None:
        repeated, counted = [*prompt, *output], list(output)
    else:
        everything = [*prompt, *output]
        repeated = counted = everything[max(len(everything) - params.repeat_last_n, 0) :]
    for token_id in set(repeated):
        factor = params.repetition_penalty
        out[token_id] = out[token_id] / factor if out[token_id] > 0 else out[token_id] * factor
    for token_id in set(counted):
        count = counted.count(token_id)
        out[token_id] -= params.frequency_penalty * count + params.presence_penalty
    return out


def dry(out: np.ndarray, params: SamplingParams, prompt, output) -> np.ndarray:
    """DRY by brute force: every token, every earlier place, the suffix compared one by one."""
    out = out.copy()
    tokens = [*prompt, *output]
    if params.dry_penalty_last_n >= 0:
        tokens = tokens[max(len(tokens) - params.dry_penalty_last_n, 0) :]
    breakers = [tuple(b) for b in params.dry_sequence_breakers]
    limit = len(tokens)
    for head in range(len(tokens) - 1, -1, -1):
        ends = [b for b in breakers if tuple(tokens[head : head + len(b)]) == b]
        if ends:
            limit = len(tokens) - head - max(map(len, ends))
            break
    if len(tokens) <= params.dry_allowed_length or limit < params.dry_allowed_length:
        return out
    longest: dict[int, int] = {}
    for place in range(1, len(tokens)):  # what stood there would repeat what led to it
        length = 0
        while length < min(place, limit) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= params.dry_allowed_length:
            longest[tokens[place]] = max(longest.get(tokens[place], 0), length)
    for token_id, length in longest.items():
        if (token_id,) not in breakers:
            power = length - params.dry_allowed_length
            out[token_id] -= params.dry_multiplier * params.dry_base**power
    return out


def adjusted(logits, params: SamplingParams, prompt, output, end_ids=()) -> np.ndarray:
    """Logits after bias, bans, penalties and DRY, in the order of ``samplers``."""
    out = np.array(logits, np.float64)
    for token_id, bias in params.logit_bias.items():
        out[token_id] += bias
    if len(output) < params.min_tokens:
        out[list(end_ids)] = -np.inf
    if params.allowed_token_ids is not None:
        out[[i for i in range(len(out)) if i not in params.allowed_token_ids]] = -np.inf
    tokens = (*prompt, *output)
    for word in params.bad_words:
        if len(word) == 1 or tokens[-len(word) + 1 :] == word[:-1]:
            out[word[-1]] = -np.inf
    for name in params.samplers:
        if name == "penalties":
            out = penalised(out, params, prompt, output)
        if name == "dry" and params.dry_multiplier:
            out = dry(out, params, prompt, output)
    return out


def _ranked(logits: np.ndarray) -> list[int]:
    """What is left, likeliest first, equals by lower id."""
    left = np.nonzero(logits > -np.inf)[0].tolist()
    return sorted(left, key=lambda i: (-logits[i], i))


def _keep(logits: np.ndarray, kept: list[int]) -> np.ndarray:
    out = np.full(len(logits), -np.inf)
    out[kept] = logits[kept]
    return out


def _entropy(logits: np.ndarray) -> float:
    p = softmax(logits)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _above(logits: np.ndarray, limit: float, params: SamplingParams) -> np.ndarray:
    """What has a probability of ``limit`` or more, the likeliest, and as many as must be kept."""
    p, ranked = softmax(logits), _ranked(logits)
    fewest = max(params.min_keep, 1)
    return _keep(logits, [i for n, i in enumerate(ranked) if p[i] >= limit or n < fewest])


def _share(logits: np.ndarray, order: list[int], share: float, params: SamplingParams):
    p = softmax(logits)
    count = 1 + int(np.searchsorted(np.cumsum(p[order]), share))
    return _keep(logits, order[: max(count, params.min_keep)])


def top_n_sigma(logits, params):
    left = logits[logits > -np.inf]
    gone = logits < left.max() - params.top_n_sigma * left.std()
    return np.where(gone, -np.inf, logits)


def temperature(logits, params):
    t, spread = params.temperature, params.dynatemp_range
    count = (logits > -np.inf).sum()
    if spread > 0 and count > 1:
        low, high = max(0.0, t - spread), t + spread
        t = low + (high - low) * (_entropy(logits) / np.log(count)) ** params.dynatemp_exponent
    return logits / t


def typical_p(logits, params):
    surprise, entropy = -log_softmax(logits), _entropy(logits)
    left = np.nonzero(logits > -np.inf)[0].tolist()
    order = sorted(left, key=lambda i: (abs(surprise[i] - entropy), i))
    return _share(logits, order, params.typical_p, params)


def xtc(logits, params):
    """As it is when its turn has come."""
    p = softmax(logits)
    top = [i for i in _ranked(logits) if p[i] >= params.xtc_threshold]
    left = (logits > -np.inf).sum() - (len(top) - 1)
    if len(top) < 2 or left < params.min_keep:
        return logits
    return np.where(np.isin(np.arange(len(logits)), top[:-1]), -np.inf, logits)


STEPS = {
    "top_n_sigma": top_n_sigma,
    "temperature": temperature,
    "top_k": lambda x, p: _keep(x, _ranked(x)[: p.top_k]),
    "typical_p": typical_p,
    "top_a": lambda x, p: _above(x, p.top_a * softmax(x).max() ** 2, p),
    "epsilon_cutoff": lambda x, p: _above(x, p.epsilon_cutoff, p),
    "eta_cutoff": lambda x, p: _above(
        x, min(p.eta_cutoff, np.sqrt(p.eta_cutoff) * np.exp(-_entropy(x))), p
    ),
    "top_p": lambda x, p: _share(x, _ranked(x), p.top_p, p),
    "min_p": lambda x, p: _above(x, p.min_p * softmax(x).max(), p),
    "xtc": xtc,
}

_OFF = {
    "top_n_sigma": lambda p: p.top_n_sigma <= 0,
    "top_k": lambda p: p.top_k == 0,
    "typical_p": lambda p: p.typical_p == 1,
    "top_p": lambda p: p.top_p == 1,
    "xtc": lambda p: p.xtc_probability == 0 or p.xtc_threshold > 0.5,
}


def distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities after the steps that drop tokens; XTC when its turn has come."""
    if params.temperature == 0:
        return np.eye(len(logits))[_ranked(logits)[0]]
    x = logits.astype(np.float64)
    for name in params.samplers:
        if name in STEPS and not _OFF.get(name, lambda p: False)(params):
            x = STEPS[name](x, params)
    return softmax(x)
