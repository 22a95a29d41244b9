"""Typed access to GGUF metadata that remembers which keys were read.

A key that changes results and that nobody read would make a model silently wrong, so a loader
reads what it understands and then raises for what ``unread`` still lists. Which keys can change
results is policy, and it stands here: by the GGUF specification hyperparameters stand under the
name of the architecture (``llama.rope.freq_base``), and llama.cpp reads no others to build a model.
Everything else (``general.*`` but for the version of the block layouts, ``tokenizer.*`` which the
tokenizer checks for itself, ``quantize.*``, ``split.*``, and the namespaces of whoever made the
file) is description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar, overload

import numpy as np

from oxillama_torch.errors import GGUFError

__all__ = ["HARMLESS_SUFFIXES", "Metadata"]

T = TypeVar("T")
D = TypeVar("D")

# Keys under the architecture's name that describe a model and do not change what it computes.
HARMLESS_SUFFIXES = frozenset(
    {
        "context_length",  # what it was trained for; positions behind it are the user's choice
        "vocab_size",  # the embedding's shape says it
        "rope.scaling.finetuned",  # whether the scaling was trained with
    }
)

# ``GGML_QNT_VERSION``: blocks of another version have other layouts.
_QUANTIZATION_VERSION = ("general.quantization_version", 2)

_REQUIRED: Any = object()


class Metadata(Mapping[str, Any]):
    """GGUF metadata: a read-only mapping whose ``get`` checks types and is remembered.

    Args:
        values: key -> value, as ``GGUFFile.metadata`` has them.
        path: the file, for messages.
    """

    def __init__(self, values: Mapping[str, Any], path: str | None = None) -> None:
        self._values = dict(values)
        self._path = path
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._values[key]

    def __iter__(self):
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    @property
    def architecture(self) -> str:
        """``general.architecture``."""
        return self.get("general.architecture", str)

    @overload
    def get(
        self, key: str, type: type[T], *, at_least: float | None = ..., at_most: float | None = ...
    ) -> T: ...

    @overload
    def get(
        self,
        key: str,
        type: type[T],
        default: D,
        *,
        at_least: float | None = ...,
        at_most: float | None = ...,
    ) -> T | D: ...

    def get(self, key, type, default=_REQUIRED, *, at_least=None, at_most=None):
        """The value of ``key``, checked.

        Args:
            type: ``bool``, ``int``, ``float`` (an integer in the file will do), ``str``,
                ``list[bool|int|float|str]``, or ``np.ndarray`` for a numeric array as it is.
            default: returned when the key is missing; without it the key must be there.
            at_least, at_most: bounds, inclusive, for a number or for each one of a list.

        Raises:
            GGUFError: the key is missing, of another type, not finite or out of bounds.
        """
        self._read.add(key)
        if key not in self._values:
            if default is _REQUIRED:
                raise self._error(key, "missing metadata key")
            return default
        value = self._convert(key, self._values[key], type)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise self._error(key, f"value {item}", "a finite number")
            if at_least is not None and item < at_least:
                raise self._error(key, f"value {item}", f"at least {at_least}")
            if at_most is not None and item > at_most:
                raise self._error(key, f"value {item}", f"at most {at_most}")
        return value

    def per_layer(
        self,
        key: str,
        type: type[T],
        layers: int,
        default: T = _REQUIRED,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> tuple[T, ...]:
        """One value per layer of a key that holds one for all or an array with one for each.

        Args:
            type: ``bool``, ``int`` or ``float``.
            layers: number of layers; an array must be as long.
            default: for every layer, when the key is missing.

        Raises:
            GGUFError: as for ``get``, or the array has another length.
        """
        bounds = {"at_least": at_least, "at_most": at_most}
        if not isinstance(self._values.get(key), (list, np.ndarray)):
            return (self.get(key, type, default, **bounds),) * layers
        values = self.get(key, list[type], **bounds)
        if len(values) != layers:
            raise self._error(key, f"array of {len(values)}", f"one value or {layers}")
        return tuple(values)

    def unread(self) -> list[str]:
        """Keys that can change results and that nobody has read or understands."""
        prefix = f"{self._values.get('general.architecture')}."
        unread = [
            key
            for key in self._values
            if key.startswith(prefix)
            and key not in self._read
            and key[len(prefix) :] not in HARMLESS_SUFFIXES
        ]
        key, version = _QUANTIZATION_VERSION
        value = self._values.get(key, version)
        return unread if isinstance(value, int) and value == version else [key, *unread]

    def _convert(self, key: str, value: Any, type: Any) -> Any:
        if type is np.ndarray:
            if isinstance(value, np.ndarray):
                return value
            raise self._error(key, f"{_describe(value)}", "an array of numbers")
        item = getattr(type, "__args__", (None,))[0]
        if item is None:
            return self._scalar(key, value, type)
        if not isinstance(value, (list, np.ndarray)):
            raise self._error(key, _describe(value), f"an array of {item.__name__}")
        items = value.tolist() if isinstance(value, np.ndarray) else value
        return [self._scalar(key, v, item) for v in items]

    def _scalar(self, key: str, value: Any, type: type) -> Any:
        if type is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        # A bool is an int to Python, but not in a file.
        if not isinstance(value, type) or isinstance(value, bool) != (type is bool):
            raise self._error(key, _describe(value), type.__name__)
        return value

    def _error(self, key: str, message: str, expected: str | None = None) -> GGUFError:
        return GGUFError(message, path=self._path, tensor=key, expected=expected)


def _describe(value: Any) -> str:
    if isinstance(value, (list, np.ndarray)):
        return f"array of {len(value)}"
    return f"{type(value).__name__} {str(value)[:40]!r}"
