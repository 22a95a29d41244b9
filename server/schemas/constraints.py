"""Fields of a request that say what its output must look like; OpenAI has ``response_format``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from oxillama_torch.errors import RequestError
from oxillama_torch.sampling.constraint import Constraint
from oxillama_torch.sampling.params import LogprobsMode

__all__ = ["ConstraintFields"]


class ConstraintFields(BaseModel):
    """Extensions shared by text and chat completions; one constraint at a time.

    ``grammar`` is llama.cpp's GBNF, ``json_schema`` a schema as such, ``regex`` an expression for
    all of the output, ``choice`` a list of texts, ``lark`` a grammar in llguidance's dialect.
    """

    model_config = ConfigDict(strict=True)

    grammar: str | None = None
    json_schema: dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    lark: str | None = None
    logprobs_mode: LogprobsMode | None = None

    def constraint(self) -> Constraint | None:
        """The constraint that is given, if one is.

        Raises:
            RequestError: more than one, or one that is too long.
        """
        given = [
            name
            for name in ("grammar", "json_schema", "regex", "choice", "lark")
            if getattr(self, name) not in (None, "")
        ]
        if not given:
            return None
        if len(given) > 1:
            raise RequestError(f"one constraint at a time: {' or '.join(given)}", param=given[1])
        [name] = given
        value = getattr(self, name)
        if name == "json_schema":
            return Constraint.json_schema(value, name)
        if name == "choice":
            return Constraint.choice(value, name)
        return Constraint("gbnf" if name == "grammar" else name, value, name)
