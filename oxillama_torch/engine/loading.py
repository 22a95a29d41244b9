"""From a configuration and an open GGUF file to an engine: device, dtype, numerics, kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from oxillama_torch import __version__
from oxillama_torch.config import EngineConfig, environment
from oxillama_torch.engine.compiling import compile_few_rows
from oxillama_torch.engine.engine import Engine, on_device
from oxillama_torch.engine.graphs import CudaGraphs
from oxillama_torch.engine.own_thread import in_own_thread
from oxillama_torch.engine.speculation.choice import check_vocabulary
from oxillama_torch.errors import UnsupportedError
from oxillama_torch.gguf.reader import GGUFFile, read_gguf
from oxillama_torch.kernels import kv_formats, registry
from oxillama_torch.kernels.formats.base import PackedTensor
from oxillama_torch.kernels.quant_matmul import compiled, cpu, dense, factored, tuned
from oxillama_torch.layers.linear import QuantLinear
from oxillama_torch.lora.registry import AdapterRegistry
from oxillama_torch.lora.targets import Targets
from oxillama_torch.models.decoder import Decoder
from oxillama_torch.models.loader import load_model
from oxillama_torch.sampling.constraint_matcher import ConstraintCompiler
from oxillama_torch.sampling.words import Words

__all__ = [
    "fingerprint",
    "load_engine",
    "open_model",
    "prepare_kernels",
    "resolve",
    "uses_graphs",
    "weights_of",
]

_SAMPLE_BYTES = 256


def resolve(config: EngineConfig) -> tuple[torch.device, torch.dtype, str]:
    """What ``auto`` means on this machine: device, activation dtype, numerics.

    Raises:
        UnsupportedError: a CUDA device that is not there.
    """
    has_cuda = torch.cuda.is_available()
    name = ("cuda" if has_cuda else "cpu") if config.device == "auto" else config.device
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if has_cuda else 0
        if (device.index or 0) >= count:
            raise UnsupportedError(
                f"device {name!r}", ("cpu", *(f"cuda:{index}" for index in range(count)))
            )
    default = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, default if config.dtype == "auto" else config.dtype)
    numerics = config.numerics
    if numerics == "auto":
        numerics = "fast" if device.type == "cuda" else "invariant"
    return device, dtype, numerics


def open_model(config: EngineConfig) -> GGUFFile:
    """The file that a configuration names, read as it says; errors as ``read_gguf``'s."""
    return read_gguf(config.model_path, type_39_is_q1_0=config.type_39_is_q1_0)


def load_engine(
    config: EngineConfig,
    gguf: GGUFFile,
    *,
    eos_ids: frozenset[int],
    banned_ids: frozenset[int] = frozenset(),
    constraints: ConstraintCompiler | None = None,
    words: Words | None = None,
    progress: Callable[[int, int], None] | None = None,
    recording: Callable[[int, int], None] | None = None,
) -> Engine:
    """Load a model and make its engine. The file may be closed afterwards.

    Args:
        config: see EngineConfig; ``kernels`` and ``tuned`` take effect for the whole process.
        gguf: the open file.
        eos_ids, banned_ids: the tokenizer's.
        constraints: with the tokenizer's vocabulary; None: requests must not have any.
        words: with the tokenizer's vocabulary; None: parameters must not hold texts.
        progress: called with (bytes loaded, bytes in all).
        recording: called with (graphs made, graphs in all), where there are any.

    Raises:
        GGUFError, UnsupportedError: as ``models.loader.load_model``.
        EngineError: no memory for KV pages.
    """
    if config.kernel_path is not None:
        registry.load_file(config.kernel_path)
    if config.tuned is not None:
        tuned.use_table(tuned.read_table(config.tuned))
    rules = config.kernels if config.kernels is not None else environment("KERNELS")
    if rules is not None:
        registry.set_rules(rules)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device, dtype, numerics = resolve(config)
    graphs = uses_graphs(config, device)

    def load(check: Callable[[], None]) -> Engine:
        def checked(done: int, total: int) -> None:
            check()
            if progress is not None:
                progress(done, total)

        with on_device(device):
            draft = _load_draft(config, gguf, device, dtype)
            model = load_model(
                gguf, device=device, dtype=dtype, numerics=numerics, progress=checked
            )
            prepare_kernels(model)
            check()
            _compile_decoding(model, config)
            check()
            engine = Engine(
                model,
                config,
                eos_ids=eos_ids,
                banned_ids=banned_ids,
                constraints=constraints,
                words=words,
                draft=draft,
                fingerprint=fingerprint(config, gguf),
                adapters=AdapterRegistry(Targets(model), budget_bytes=config.adapter_memory_bytes),
                graphs=CudaGraphs(device) if graphs else None,
            )
            with torch.inference_mode():
                engine.capture_graphs(recording)
            return engine

    return in_own_thread(load, "oxillama-load")


def uses_graphs(config: EngineConfig, device: torch.device) -> bool:
    """Whether decode steps are recorded and replayed.

    Raises:
        UnsupportedError: graphs are asked for where there is no GPU.
    """
    if config.graphs == "on" and device.type != "cuda":
        raise UnsupportedError(f"graphs on {device}", ("auto", "off", "on with a GPU"))
    return config.graphs != "off" and device.type == "cuda"


def _load_draft(
    config: EngineConfig, gguf: GGUFFile, device: torch.device, dtype: torch.dtype
) -> Decoder | None:
    """The model that guesses, if one is to. Its own rounding matters to nobody: fast numerics."""
    if config.draft_path is None:
        return None
    with read_gguf(config.draft_path) as file:
        check_vocabulary(gguf.metadata, file.metadata)
        draft = load_model(file, device=device, dtype=dtype, numerics="fast")
    prepare_kernels(draft)
    _compile_decoding(draft, config)
    return draft


def weights_of(model: torch.nn.Module) -> list[PackedTensor]:
    """The packed matrices that a model multiplies with."""
    return [module.weight for module in model.modules() if isinstance(module, QuantLinear)]


def prepare_kernels(model: Decoder, weights: Sequence[PackedTensor] | None = None) -> None:
    """Do now what the kernels in force would else do at their first use; it can take a minute.

    Args:
        model: whose products they compute.
        weights: those to make ready, of the model or to become so; None: all of the model's.
    """
    weights = weights_of(model) if weights is None else weights
    large = _is_large(model)
    if model.numerics == "fast":
        factored.prepare(weights, even_if_small=large)
    chosen = {
        name: _backend(name, model.device, model.dtype, model.numerics)
        for name in {weight.type_name for weight in weights}
    }
    cpu.prepare(weight for weight in weights if chosen[weight.type_name] == "cpu")
    left = [weight for weight in weights if chosen[weight.type_name] not in ("cpu", "factored")]
    compiled.prepare(left, even_if_small=large)
    if large and model.numerics == "fast":
        dense.prepare(weights)


def _compile_decoding(model: Decoder, config: EngineConfig) -> None:
    pages = kv_formats.find(config.kv_dtype, model.dtype)
    compile_few_rows(
        model, page_size=config.page_size, page_dtype=pages.dtype, large=_is_large(model)
    )


def _is_large(model: Decoder) -> bool:
    """Whether compiling pays: a matter of the whole model, not of what is left for it."""
    return sum(w.shape[0] * w.shape[1] for w in weights_of(model)) >= compiled.MIN_WEIGHTS


def _backend(type_name: str, device: torch.device, dtype: torch.dtype, numerics: str) -> str:
    """What multiplies with weights of a type, as things stand: compiling may change it."""
    call = registry.Call(device.type, dtype, numerics, type_name)
    return registry.select("quant_matmul", call).backend


def fingerprint(config: EngineConfig, gguf: GGUFFile) -> str:
    """Name of everything that shapes an output: build, model, numerics, kernels and device.

    Equal outputs are promised for equal fingerprints only. Of each tensor, name, type, shape and a
    few bytes of its data go in: reading all of a large file would take longer than loading it.

    Returns: ``fp_`` and 16 hexadecimal digits.
    """
    device, dtype, numerics = resolve(config)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_capability()
    parts = [__version__, torch.__version__, str(dtype), numerics, hardware]
    parts.append(f"kv={kv_formats.find(config.kv_dtype, dtype).name}")
    parts += [repr(registry.active_rules()), tuned.fingerprint(device)]
    if numerics == "fast":
        # How many tokens a step computes is up to the guesses, and what they round to with it.
        parts.append(f"speculation={config.speculation}")
    for type_name in sorted({info.type.name for info in gguf.tensors.values()}):
        try:
            backend = _backend(type_name, device, dtype, numerics)
        except UnsupportedError as error:
            # Norms, routers and embeddings have types too, which a kernel that was asked for
            # need not multiply with. Whether it serves what it must, prepare_kernels has asked.
            backend = str(error)
        parts.append(f"{type_name}={backend}")
    digest = hashlib.sha256("\n".join(parts).encode())
    for name, info in sorted(gguf.tensors.items()):
        data = gguf.data(name)
        digest.update(f"{name} {info.type} {info.shape} ".encode())
        digest.update(data[:_SAMPLE_BYTES].numpy())
        digest.update(data[-_SAMPLE_BYTES:].numpy())
    return f"fp_{digest.hexdigest()[:16]}"


def _cpu_capability() -> str:
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"
