"""``/admin/kernels``: which kernels serve, why, and switching them while serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from flask import Blueprint, Response, jsonify

from oxillama_torch.engine.engine import Engine
from oxillama_torch.engine.loading import fingerprint, open_model, prepare_kernels, weights_of
from oxillama_torch.errors import RequestError, UnsupportedError
from oxillama_torch.kernels import registry
from oxillama_torch.kernels.choices import Choice, choices
from oxillama_torch.server.http import json_body
from oxillama_torch.server.pool import Services
from oxillama_torch.server.schemas.admin import KernelsBody
from oxillama_torch.server.service import Service

__all__ = ["blueprint"]


@dataclass(frozen=True, slots=True)
class _Setting:
    """What a model asks of kernels."""

    device: str
    dtype: torch.dtype
    numerics: str
    types: tuple[str, ...]

    @classmethod
    def of(cls, engine: Engine) -> _Setting:
        model = engine.model
        types = sorted({weight.type_name for weight in weights_of(model)})
        return cls(model.device.type, model.dtype, model.numerics, tuple(types))

    def choices(self, op: str) -> list[Choice]:
        return choices(op, self.device, self.dtype, self.numerics, self.types)


def blueprint(services: Services) -> Blueprint:
    """Routes of the kernel library."""
    routes = Blueprint("admin_kernels", __name__)

    @routes.get("/admin/kernels")
    def show() -> Response:
        return jsonify(_describe(services))

    @routes.put("/admin/kernels")
    def switch() -> Response:
        body = KernelsBody.model_validate(json_body())
        try:
            rules = registry.parse_rules(body.kernels)
            _between_steps(services.ready(), lambda engines: _switch(engines, rules))
        except UnsupportedError as error:
            raise RequestError(str(error), code="unsupported_value", param="kernels") from error
        for service in services.ready():
            _rename(service)
        return jsonify(_describe(services))

    return routes


def _describe(services: Services) -> dict:
    models = []
    for service in services.ready():
        setting = service.engine.call(_Setting.of)
        kernels = [asdict(c) for op in registry.registered_ops() for c in setting.choices(op)]
        models.append(
            {
                "id": service.model_id,
                "device": setting.device,
                "dtype": str(setting.dtype).removeprefix("torch."),
                "numerics": setting.numerics,
                "types": setting.types,
                "system_fingerprint": service.fingerprint,
                "kernels": kernels,
            }
        )
    return {
        "object": "kernels",
        "rules": registry.format_rules(registry.active_rules()),
        "models": models,
        "left_out": registry.missing_modules(),
    }


def _between_steps(services: list[Service], function: Callable[[list[Engine]], None]) -> None:
    """Call ``function`` while no engine computes: rules are the whole process's."""

    def enter(left: list[Service], engines: list[Engine]) -> None:
        if not left:
            function(engines)
        else:
            left[0].engine.call(lambda engine: enter(left[1:], [*engines, engine]))

    enter(services, [])


def _switch(engines: list[Engine], rules: tuple[registry.Rule, ...]) -> None:
    """Set the rules, unless they leave a model with a call that nothing serves."""
    before = registry.active_rules()
    registry.set_rules(rules)
    try:
        for engine in engines:
            setting = _Setting.of(engine)
            for op in {rule.op for rule in rules}:
                for choice in setting.choices(op):
                    if choice.backend is None:
                        raise UnsupportedError(choice.reason)
            prepare_kernels(engine.model)
    except BaseException:
        registry.set_rules(before)
        raise


def _rename(service: Service) -> None:
    """Other kernels, other bits: the fingerprint follows."""
    if service.owner is not None:
        with open_model(service.owner.config) as gguf:
            service.fingerprint = fingerprint(service.owner.config, gguf)
