"""Fields that hold an answer to a language: llama-server's names and vLLM's."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.server.schemas.lists import Several

__all__ = ["ConstraintFields"]


class StructuredOutputs(BaseModel):
    """vLLM's object; ``json`` is a schema or its text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Several[str] | None = None
    grammar: str | None = None


class ConstraintFields(BaseModel):
    """At most one of these, and none beside ``response_format``."""

    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = None
    choice: Several[str] | None = None
    structured_outputs: StructuredOutputs | None = None

    def constraint(self) -> Constraint | None:
        """The constraint asked for.

        Raises:
            RequestError: more than one.
        """
        found = self._own("", self)
        if self.structured_outputs is not None:
            found += self._own("structured_outputs.", self.structured_outputs)
        if len(found) > 1:
            names = " and ".join(constraint.param for constraint in found)
            raise RequestError(f"one constraint at a time, not {names}", param=found[1].param)
        return found[0] if found else None

    @staticmethod
    def _own(prefix: str, fields: ConstraintFields | StructuredOutputs) -> list[Constraint]:
        found = []
        if fields.grammar:
            # GBNF names its rules with ::=, Lark with a colon alone.
            kind = "gbnf" if "::=" in fields.grammar else "lark"
            found.append(Constraint(kind, fields.grammar, f"{prefix}grammar"))
        if fields.json_schema is not None:
            schema = fields.json_schema
            param = f"{prefix}json" if prefix else "json_schema"
            if isinstance(schema, str):
                found.append(Constraint("json_schema", schema, param))
            else:
                found.append(Constraint.json_schema(schema, param))
        if getattr(fields, "json_object", None):
            found.append(Constraint("json_object", "", f"{prefix}json_object"))
        if fields.regex is not None:
            found.append(Constraint("regex", fields.regex, f"{prefix}regex"))
        if fields.choice is not None:
            found.append(Constraint.choice(fields.choice, f"{prefix}choice"))
        return found
