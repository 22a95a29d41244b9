"""What a request's output must look like. Plain data: nothing is compiled here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from oxillama_torch.errors import RequestError

__all__ = ["MAX_SOURCE", "Constraint", "ConstraintKind"]

ConstraintKind = Literal["gbnf", "json_schema", "regex", "choice", "lark", "json_object"]

#: Most bytes of a constraint's source.
MAX_SOURCE = 256 * 1024


@dataclass(frozen=True, slots=True)
class Constraint:
    """A language that the output must belong to, whatever the model would rather say.

    Args:
        kind: ``gbnf`` (llama.cpp's grammars), ``json_schema``, ``json_object`` (any object),
            ``regex`` (of the whole output), ``choice`` (one of several texts) or ``lark``
            (llguidance's dialect, which may name special tokens).
        source: the grammar or expression; JSON text for ``json_schema`` and ``choice`` (a list of
            strings), nothing for ``json_object``.
        param: what errors call it, such as ``response_format.json_schema.schema``; two constraints
            that differ in this alone are equal.

    Raises:
        RequestError: an unknown kind, or a source of more than ``MAX_SOURCE`` bytes.
    """

    kind: ConstraintKind
    source: str = ""
    param: str = field(default="constraint", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in get_args(ConstraintKind):
            known = ", ".join(get_args(ConstraintKind))
            raise RequestError(f"{self.kind!r} is none of: {known}", param=self.param)
        try:
            size = len(self.source.encode())
        except UnicodeEncodeError:
            raise RequestError("the text holds a lone surrogate", param=self.param) from None
        if size > MAX_SOURCE:
            raise RequestError(
                f"a constraint has at most {MAX_SOURCE} bytes, this one {size}", param=self.param
            )

    @classmethod
    def json_schema(
        cls, schema: Mapping[str, Any] | bool, param: str = "json_schema"
    ) -> Constraint:
        """Valid JSON texts of a schema; properties come in the schema's order."""
        try:
            return cls("json_schema", json.dumps(schema), param)
        except RecursionError:
            raise RequestError("the schema is nested too deeply", param=param) from None

    @classmethod
    def choice(cls, texts: Sequence[str], param: str = "choice") -> Constraint:
        """One of ``texts``, exactly."""
        return cls("choice", json.dumps(list(texts)), param)
