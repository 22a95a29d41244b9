"""A decode step does nothing that a CUDA graph cannot hold, as far as that shows without a GPU.

It runs on tensors that hold nothing (torch's "meta" device), with the kernels that would be chosen
on a GPU and are not launched. What asks for a value, has a shape that hangs on one, or copies from
or to the host, is refused.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from recorded_calls import RecordedCalls
from tiny_models import write_tiny
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from oxillama_torch.engine.adapter_lines import AdapterLines, AdapterShape  # noqa: E402
from oxillama_torch.engine.decode_state import DecodeState  # noqa: E402
from oxillama_torch.engine.decode_step import DecodeStep  # noqa: E402
from oxillama_torch.engine.prefill_graphs import PrefillGraphs  # noqa: E402
from oxillama_torch.gguf.reader import read_gguf  # noqa: E402
from oxillama_torch.kernels import registry, triton_support  # noqa: E402
from oxillama_torch.kernels.formats.base import PackedTensor  # noqa: E402
from oxillama_torch.kernels.kv_formats import find  # noqa: E402
from oxillama_torch.kvcache.pool import KVPool  # noqa: E402
from oxillama_torch.layers.rope import HeadNorms  # noqa: E402
from oxillama_torch.lora.targets import Targets  # noqa: E402
from oxillama_torch.models.loader import load_model  # noqa: E402

pytestmark = pytest.mark.skipif(
    not triton_support.INTERPRET, reason="the real thing is tested on a GPU"
)

_OPS = ("attention", "embedding", "gated", "lora", "quant_matmul", "quant_matmul_experts",
        "quant_matmul_gated", "quant_matmul_segments", "rms_norm",
        "rope_store_kv", "sample")  # fmt: skip


class Refusing(TorchDispatchMode):
    """Refuses what cannot be captured; counts what can."""

    _FORBIDDEN = (
        *("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.unique"),
        "aten.repeat_interleave.Tensor",
    )

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        assert not str(func).startswith(self._FORBIDDEN), f"{func} asks for a value"
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            other = out if name == "_to_copy" else args[1]
            assert args[0].device == other.device, f"{func} copies between devices"
        return out


@pytest.fixture
def without_launches(monkeypatch):
    """Kernels are chosen as on a GPU, and not launched. Returns: names of those that would be."""
    import triton.runtime.interpreter as interpreter

    from oxillama_torch.kernels.attention import triton_backend

    launched: list[str] = []
    monkeypatch.setattr(
        interpreter.InterpretedFunction,
        "__getitem__",
        lambda self, grid: lambda *args, **kwargs: launched.append(self.fn.__name__),
    )
    select = registry.select
    monkeypatch.setattr(
        registry, "select", lambda op, call: select(op, call._replace(device="cuda"))
    )
    monkeypatch.setattr(triton_backend, "multiprocessors", lambda device: 132)
    return launched


def faked(model: torch.nn.Module) -> torch.nn.Module:
    """Every tensor of a model in the place of one that holds nothing."""

    def fake(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")

    def packed(weight: PackedTensor) -> PackedTensor:
        planes = {name: fake(plane) for name, plane in weight.planes.items()}
        return PackedTensor(weight.format, weight.shape, planes)

    for module in model.modules():
        for name, value in list(module._buffers.items()):
            if value is not None:
                module._buffers[name] = fake(value)
        for name, value in list(vars(module).items()):
            if isinstance(value, PackedTensor):
                setattr(module, name, packed(value))
            elif isinstance(value, list) and value and isinstance(value[0], PackedTensor):
                setattr(module, name, [packed(item) for item in value])
            elif isinstance(value, HeadNorms):
                setattr(module, name, value._replace(q=fake(value.q), k=fake(value.k)))
            elif isinstance(value, torch.Tensor):
                setattr(module, name, fake(value))
    return model


@pytest.mark.parametrize("numerics", ["invariant", "fast"])
@pytest.mark.parametrize("arch", ["llama", "qwen3moe"])
def test_a_step_can_be_captured(arch, numerics, tmp_path, without_launches):
    write_tiny(arch, tmp_path / "tiny.gguf", type_name="Q8_0")
    with read_gguf(tmp_path / "tiny.gguf") as gguf:
        model = load_model(gguf, dtype=torch.bfloat16, numerics=numerics)
    shapes, vocab_size = model.kv_shapes(), model.config.vocab_size
    numbers = Targets(model).numbers
    rules = ",".join(f"{op}=triton" for op in _OPS)
    with torch.inference_mode(), registry.use_kernels(rules):
        pool = KVPool(shapes, num_pages=8, page_size=16, device="meta",
                      format=find("auto", torch.bfloat16))  # fmt: skip
        state = DecodeState(8, 64, vocab_size, "meta")
        banned = torch.empty(3, dtype=torch.int64, device="meta")
        adapters = AdapterLines(numbers, 8, torch.device("meta"), torch.bfloat16, numerics)
        shape = AdapterShape(rounds=2, layers=(1 << len(numbers)) - 1, rank=32)
        step = DecodeStep(faked(model), pool, state, banned)
        prompts = PrefillGraphs(model, pool, RecordedCalls(), max_pages=64, most_tokens=128)
        for mode in (contextlib.nullcontext(), Refusing()):  # the first run makes tables
            with mode:
                for tokens in (16, 128):
                    prompts._run(tokens, 1024)
                for lines in (1, 4, 8):
                    step.forward(lines, 1024)
                    step.forward(lines, 1024, adapters.batch(shape, lines))
                    for penalised in (False, True):
                        step.choose(lines, penalised=penalised, masked=penalised)
    assert mode.calls > 100
    expected = {"sample_kernel", "mask_kernel", "penalise_kernel", "shrink_kernel", "expand_kernel"}
    assert expected < set(without_launches)
