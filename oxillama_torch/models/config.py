"""GGUF metadata -> ModelConfig: every number that the decoder needs, checked.

Keys that are neither read here nor known to leave results alone are errors: a file that asks for
something this build does not do must not load as if it had not.
"""

from __future__ import annotations

from dataclasses import dataclass

from oxillama_torch.errors import GGUFError, UnsupportedError
from oxillama_torch.gguf.metadata import Metadata
from oxillama_torch.layers.rope import RopeConfig
from oxillama_torch.models.architectures import Architecture, find_architecture

__all__ = ["ExpertConfig", "LayerConfig", "ModelConfig"]

# far above any model; they bound what a hostile file can make us build
_MAX_LAYERS = 4096
_MAX_SIZE = 1 << 24
_SOFTMAX_GATING = 1  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX

_POOLINGS = {0: "last", 1: "mean", 2: "first", 3: "last"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerConfig:
    """What may differ from layer to layer.

    Args:
        num_heads, num_kv_heads: of queries, and of keys and values.
        intermediate_size: of the feed-forward layer (of one expert, where there are experts).
        window: tokens that attention sees, the current one included; None: all.
    """

    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertConfig:
    """Experts of each layer.

    Args:
        count: how many there are.
        used: how many a token goes through.
        normalize: their weights are divided by their sum.
        scale: and then multiplied by this.
    """

    count: int
    used: int
    normalize: bool = True
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder in numbers.

    Args:
        architecture: the row of the architecture table.
        name: ``general.name``, or the architecture's.
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream.
        context_length: tokens the model was made for.
        key_dim, value_dim: size of a query/key head and of a value head.
        layers: one per layer, first to last.
        rope: angles of the rotation.
        norm_eps: of the norms.
        attention_scale: factor of the attention scores.
        experts: None for dense feed-forward layers.
        embedding_scale, residual_scale: factors of the embedding and of what each sublayer adds.
        logit_scale: the logits are divided by it.
        pooling: what makes an embedding of a text's hidden states where nobody says.
    """

    architecture: Architecture
    name: str
    vocab_size: int
    hidden_size: int
    context_length: int
    key_dim: int
    value_dim: int
    layers: tuple[LayerConfig, ...]
    rope: RopeConfig
    norm_eps: float
    attention_scale: float
    experts: ExpertConfig | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    pooling: str = "last"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> ModelConfig:
        """Read the metadata of a file.

        Raises:
            GGUFError: a key is missing, of the wrong type, or out of range.
            UnsupportedError: unknown architecture, or a key that changes results in a way this
                build does not know; names it.
        """
        architecture = find_architecture(metadata.architecture)
        keys = _Keys(metadata, architecture.name)
        hidden_size = keys.size("embedding_length")
        heads = keys.sizes("attention.head_count")
        if heads[0] > hidden_size:
            raise keys.error("attention.head_count", heads[0], f"at most {hidden_size}")
        key_dim = keys.size("attention.key_length", hidden_size // heads[0])
        config = cls(
            architecture=architecture,
            name=metadata.get("general.name", str, architecture.name),
            vocab_size=_read_vocab_size(keys),
            hidden_size=hidden_size,
            context_length=keys.size("context_length"),
            key_dim=key_dim,
            value_dim=keys.size("attention.value_length", hidden_size // heads[0]),
            layers=_read_layers(keys, architecture, heads),
            rope=_read_rope(keys, architecture, key_dim),
            norm_eps=keys.get("attention.layer_norm_rms_epsilon", float, at_least=0.0),
            experts=_read_experts(keys, architecture),
            pooling=_read_pooling(keys),
            **_read_scales(keys, architecture, key_dim),
        )
        _check_understood(keys, architecture)
        return config


class _Keys:
    """Typed access to ``<architecture>.*``."""

    def __init__(self, metadata: Metadata, architecture: str) -> None:
        self.metadata = metadata
        self.prefix = f"{architecture}."
        self.num_layers = self.size("block_count", at_most=_MAX_LAYERS)

    def get(self, key: str, type: type, *default: object, **bounds: float | None):
        return self.metadata.get(self.prefix + key, type, *default, **bounds)

    def size(self, key: str, *default: int, at_most: int = _MAX_SIZE) -> int:
        return self.get(key, int, *default, at_least=1, at_most=at_most)

    def sizes(self, key: str, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """One per layer, from a number for all of them or from an array."""
        key = self.prefix + key
        if default is not None and key not in self.metadata:
            return default
        return self.metadata.per_layer(key, int, self.num_layers, at_least=1, at_most=_MAX_SIZE)

    def factor(self, key: str, default: float = 1.0) -> float:
        """A number to multiply or divide by; 0 stands for the default, as in llama.cpp."""
        return self.get(key, float, 0.0, at_least=0.0) or default

    def only(self, key: str, type: type, value: object) -> None:
        """Read a key that is supported at one value alone."""
        found = self.get(key, type, value)
        if found != value:
            raise UnsupportedError(f"{self.prefix}{key} = {found!r}", [repr(value)])

    def error(self, key: str, value: object, expected: str) -> GGUFError:
        return GGUFError(f"value {value!r}", tensor=self.prefix + key, expected=expected)


def _read_vocab_size(keys: _Keys) -> int:
    tokens = keys.metadata.get("tokenizer.ggml.tokens", list[str], [])
    return keys.size("vocab_size", *([len(tokens)] if tokens else []))


def _read_layers(
    keys: _Keys, architecture: Architecture, heads: tuple[int, ...]
) -> tuple[LayerConfig, ...]:
    kv_heads = keys.sizes("attention.head_count_kv", heads)
    for head_count, kv_head_count in zip(heads, kv_heads):
        if head_count % kv_head_count:
            raise keys.error("attention.head_count_kv", kv_head_count, f"a divisor of {head_count}")
    intermediate = keys.sizes("feed_forward_length")
    if architecture.experts != "never":
        intermediate = keys.sizes("expert_feed_forward_length", intermediate)
    window = 0
    if architecture.sliding_window:
        window = keys.get("attention.sliding_window", int, 0, at_least=0)
    return tuple(
        LayerConfig(num_heads=h, num_kv_heads=k, intermediate_size=f, window=window or None)
        for h, k, f in zip(heads, kv_heads, intermediate)
    )


def _read_rope(keys: _Keys, architecture: Architecture, key_dim: int) -> RopeConfig:
    dim = keys.size("rope.dimension_count", key_dim)
    if dim % 2 or dim > key_dim:
        raise keys.error("rope.dimension_count", dim, f"an even number up to {key_dim}")
    # scale_linear is the name of the factor from before there were other kinds of scaling
    factor = keys.factor("rope.scaling.factor", keys.factor("rope.scale_linear"))
    scaling = keys.get("rope.scaling.type", str, "linear")
    if scaling not in ("none", "linear", "yarn"):
        what = f"{keys.prefix}rope.scaling.type = {scaling!r}"
        raise UnsupportedError(what, ["none", "linear", "yarn"])
    keys.only("rope.scaling.yarn_ext_factor", float, 1.0)
    keys.only("rope.scaling.yarn_attn_factor", float, 1.0)
    return RopeConfig(
        style=architecture.rope_style,
        dim=dim,
        theta=keys.get("rope.freq_base", float, 10_000.0, at_least=2.0),
        scaling=scaling,
        factor=factor,
        original_context=keys.size(
            "rope.scaling.original_context_length", keys.size("context_length")
        ),
        beta_fast=keys.factor("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.factor("rope.scaling.yarn_beta_slow", 1.0),
        attn_factor=keys.factor("rope.scaling.attn_factor"),
        log_multiplier=keys.get("rope.scaling.yarn_log_multiplier", float, 0.0, at_least=0.0),
    )


def _read_experts(keys: _Keys, architecture: Architecture) -> ExpertConfig | None:
    if architecture.experts == "never":
        return None
    default = [0] if architecture.experts == "optional" else []
    count = keys.get("expert_count", int, *default, at_least=0, at_most=_MAX_SIZE)
    used = keys.get("expert_used_count", int, *default, at_least=0)
    if count == 0 and used == 0 and architecture.experts == "optional":
        return None
    if not 1 <= used <= count:
        raise keys.error("expert_used_count", used, f"1 to {count}")
    keys.only("expert_gating_func", int, _SOFTMAX_GATING)
    return ExpertConfig(
        count=count,
        used=used,
        normalize=keys.get("expert_weights_norm", bool, True),
        scale=keys.factor("expert_weights_scale"),
    )


def _read_scales(keys: _Keys, architecture: Architecture, key_dim: int) -> dict[str, float]:
    if not architecture.scales:
        return {"attention_scale": key_dim**-0.5}
    return {
        "attention_scale": keys.factor("attention.scale", key_dim**-0.5),
        "embedding_scale": keys.factor("embedding_scale"),
        "residual_scale": keys.factor("residual_scale"),
        "logit_scale": keys.factor("logit_scale"),
    }


def _read_pooling(keys: _Keys) -> str:
    """llama.cpp's numbers; files of models that were made to write say 0 or nothing."""
    number = keys.get("pooling_type", int, 0, at_least=0)
    if number not in _POOLINGS:
        raise UnsupportedError(f"{keys.prefix}pooling_type = {number}", map(str, _POOLINGS))
    return _POOLINGS[number]


def _check_understood(keys: _Keys, architecture: Architecture) -> None:
    for key, value in architecture.fixed:
        keys.only(key, type(value), value)
    ignored = {keys.prefix + key for key in architecture.ignored}
    if unread := sorted(set(keys.metadata.unread()) - ignored):
        what = f"metadata not understood that may change results: {', '.join(unread)}"
        raise UnsupportedError(what)
