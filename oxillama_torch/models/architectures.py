"""What sets the supported model families apart beyond what their files say: one row each.

A GGUF file names its architecture and gives sizes, scales and norms' epsilon. How its rotation
pairs dimensions, or whether an expert's share is renormalised, is knowledge of the architecture.
A new family of this shape is a row here; a new kind of difference is a column, read in
``loader.py`` or ``decoder.py``.

Source: the graphs of llama.cpp (src/models) and of transformers, which the tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass

from oxillama_torch.errors import UnsupportedError

__all__ = ["ARCHITECTURES", "Architecture", "find_architecture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A row of the table.

    Args:
        name: value of ``general.architecture``.
        rope_style: ``norm`` (neighbouring dimensions pair up, as converters permute them) or
            ``neox`` (halves pair up).
        qk_norm: each head of q and k is normed before the rotation.
        qkv_bias: q, k and v must have biases; elsewhere a bias is used where a file has it.
        experts: ``never``, ``optional`` or ``always``.
        activation: of the gate in feed-forward layers.
        scales: the file's embedding, residual, logit and attention scales count.
        sliding_window: the file's window, if there is one, holds in every layer.
        fixed: (key, value) pairs: keys that are supported at one value alone.
        ignored: keys that files carry and that have no effect on logits in any graph.
    """

    name: str
    rope_style: str
    qk_norm: bool = False
    qkv_bias: bool = False
    experts: str = "never"
    activation: str = "silu"
    scales: bool = False
    sliding_window: bool = False
    fixed: tuple[tuple[str, bool | int | float], ...] = ()
    ignored: tuple[str, ...] = ()


_NO_SHARED_EXPERTS = (("expert_shared_count", 0), ("expert_shared_feed_forward_length", 0))

# Experts: softmax over all, the best taken, their shares divided by the sum. llama files with
# experts are Mixtral's; qwen3moe is converted from models with norm_topk_prob only.
_ROWS = (
    Architecture(
        name="llama",
        rope_style="norm",
        experts="optional",
        sliding_window=True,
        fixed=_NO_SHARED_EXPERTS,
        ignored=("tensor_data_layout",),
    ),
    Architecture(
        name="qwen2",
        rope_style="neox",
        qkv_bias=True,
        # early converters wrote use_parallel_residual into files of a model that has none
        ignored=("use_parallel_residual",),
    ),
    Architecture(name="qwen3", rope_style="neox", qk_norm=True),
    Architecture(
        name="qwen3moe",
        rope_style="neox",
        qk_norm=True,
        experts="always",
        fixed=_NO_SHARED_EXPERTS,
    ),
    Architecture(
        name="granite",
        rope_style="norm",
        scales=True,
        # in this family the key says whether there is any rotation at all
        fixed=(("rope.scaling.finetuned", True), *_NO_SHARED_EXPERTS),
    ),
)
ARCHITECTURES: dict[str, Architecture] = {row.name: row for row in _ROWS}


def find_architecture(name: str) -> Architecture:
    """The row called ``name``.

    Raises:
        UnsupportedError: there is none; lists those there are.
    """
    if name not in ARCHITECTURES:
        raise UnsupportedError(f"architecture {name!r}", sorted(ARCHITECTURES))
    return ARCHITECTURES[name]
