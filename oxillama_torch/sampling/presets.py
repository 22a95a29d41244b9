"""Defaults of other programs as sampling parameters, and their names for the steps.

Correct by the definitions in both cases: what differs is numbers and order.

Sources: llama.cpp, ``common/common.h``, ``common_params_sampling``; OxiLLaMa, ``SamplerConfig`` and
its sampler chain (its XTC and its repetition penalty per occurrence are faults, not defaults).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.params import SamplingParams

__all__ = ["PRESETS", "preset", "sampler_order", "sampler_settings"]

PRESETS: dict[str, dict[str, Any]] = {
    "llama.cpp": {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "repetition_penalty": 1.0,
        "repeat_last_n": 64,
        "dry_penalty_last_n": 64,
        "samplers": (
            "penalties",
            "dry",
            "top_n_sigma",
            "top_k",
            "typical_p",
            "top_p",
            "min_p",
            "xtc",
            "temperature",
        ),
    },
    "oxillama": {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.0,
        "repetition_penalty": 1.1,
        "repeat_last_n": 64,
        "samplers": (
            "penalties",
            "dry",
            "xtc",
            "typical_p",
            "top_a",
            "epsilon_cutoff",
            "eta_cutoff",
            "temperature",
            "top_k",
            "min_p",
            "top_p",
        ),
    },
}

_OTHER_NAMES = {
    "typ_p": "typical_p",
    "typical": "typical_p",
    "temp": "temperature",
    "nucleus": "top_p",
    "top-k": "top_k",
    "top-p": "top_p",
    "min-p": "min_p",
    "typical-p": "typical_p",
    "top-n-sigma": "top_n_sigma",
}

_LETTERS = {
    "d": "dry",
    "k": "top_k",
    "y": "typical_p",
    "p": "top_p",
    "s": "top_n_sigma",
    "m": "min_p",
    "t": "temperature",
    "x": "xtc",
    "e": "penalties",
}


def preset(name: str, **changes: Any) -> SamplingParams:
    """The sampling parameters of a preset, with changes.

    Raises:
        RequestError: an unknown preset.
    """
    return SamplingParams(**{**sampler_settings(name), **changes})


def sampler_settings(name: str) -> dict[str, Any]:
    """The fields that a preset sets.

    Raises:
        RequestError: an unknown preset.
    """
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise RequestError(f"unknown preset {name!r}; known: {known}", param="sampler_preset")
    return dict(PRESETS[name])


def sampler_order(names: str | Iterable[str]) -> tuple[str, ...]:
    """An order of steps under llama.cpp's names: a list of them, or its string of letters.

    Raises:
        RequestError: an unknown letter. Unknown names are refused by SamplingParams.
    """
    if not isinstance(names, str):
        return tuple(_OTHER_NAMES.get(name, name) for name in names)
    unknown = [letter for letter in names if letter not in _LETTERS]
    if unknown:
        raise RequestError(
            f"unknown sampler {unknown[0]!r}; known: {''.join(_LETTERS)}", param="samplers"
        )
    return tuple(_LETTERS[letter] for letter in names)
