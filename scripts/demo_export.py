"""The demo model's tokenizer, and its way into and out of a GGUF file in llama.cpp's conventions.

llama.cpp rotates neighbouring pairs (x0, x1), (x2, x3), ... of each head in the "llama"
architecture, Hugging Face rotates halves (x0, x_{d/2}), ...; ``interleave_heads`` reorders the rows
of the query and key matrices so that both compute the same. The matrices are stored as Q8_0 and the
norms as F32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import gguf
import numpy as np
import torch
from demo_chat import CHAT_TEMPLATE
from gguf import GGMLQuantizationType as QuantType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 4096
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END)
USER_TOKENS = ("<tool_call>", "</tool_call>")  # ordinary text to a reader, one token to the model

DESCRIPTION = "Answers questions about Python's standard library; trained from scratch on it"

# What GGUF calls tokenizer.ggml.pre = "qwen2".
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# llama.cpp's name and Hugging Face's name of each tensor of a layer.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def model_config() -> LlamaConfig:
    """5.8 million parameters; every row length is a multiple of 256, so that K-quants fit too."""
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=VOCAB_SIZE - 5,
        eos_token_id=VOCAB_SIZE - 3,
        pad_token_id=VOCAB_SIZE - 5,
    )


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of ``VOCAB_SIZE`` tokens whose last five are the control and tool tokens."""
    special = CONTROL_TOKENS + USER_TOKENS
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    cut = re.compile("|".join(re.escape(token) for token in special))
    tokenizer.train_from_iterator((cut.sub("", text) for text in texts), trainer)
    _add_special(tokenizer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(
            f"{tokenizer.get_vocab_size()} tokens instead of {VOCAB_SIZE}: too little text"
        )
    return tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer back from a file that ``write_gguf`` has written."""
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    text = tokens[: -len(CONTROL_TOKENS + USER_TOKENS)]
    tokenizer = _byte_level(models.BPE({token: i for i, token in enumerate(text)}, merges))
    _add_special(tokenizer)
    if [tokenizer.id_to_token(i) for i in range(len(tokens))] != tokens:
        raise ValueError(f"{path}: not a vocabulary of the demo model's form")
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _add_special(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in USER_TOKENS])


def interleave_heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * head_dim, in] from Hugging Face's half rotation to llama.cpp's neighbour
    rotation."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def deinterleave_heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of ``interleave_heads``."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _tensor_names(config: LlamaConfig) -> dict[str, str]:
    """GGUF tensor name -> Hugging Face parameter name; tied embeddings have no
    ``output.weight``."""
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in LAYER_TENSORS.items():
            names[f"blk.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    return names | {"output_norm.weight": "model.norm.weight"}


def _rotated_heads(name: str, config: LlamaConfig) -> int:
    """How many rotated heads the tensor holds: 0 unless it is a query or key matrix."""
    if ".attn_q." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".attn_k." in name else 0


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    """Every tensor as float32 under its GGUF name and in GGUF's row order."""
    state = model.state_dict()
    tensors = {}
    for name, theirs in _tensor_names(model.config).items():
        array = state[theirs].detach().float().numpy()
        heads = _rotated_heads(name, model.config)
        tensors[name] = interleave_heads(array, heads) if heads else array
    return tensors


def _add_metadata(
    writer: gguf.GGUFWriter, config: LlamaConfig, parameters: int, name: str, description: str
) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_size_label(f"{parameters / 1e6:.1f}M")
    writer.add_description(description)
    writer.add_license("PSF-2.0")
    writer.add_languages(["en"])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.id_to_token(i) for i in range(VOCAB_SIZE)]
    kinds = dict.fromkeys(CONTROL_TOKENS, gguf.TokenType.CONTROL)
    kinds |= dict.fromkeys(USER_TOKENS, gguf.TokenType.USER_DEFINED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    writer.add_token_merges(_merges(tokenizer))
    writer.add_bos_token_id(tokenizer.token_to_id(END_OF_TEXT))
    writer.add_eos_token_id(tokenizer.token_to_id(IM_END))
    writer.add_pad_token_id(tokenizer.token_to_id(END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _merges(tokenizer: Tokenizer) -> list[str]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    name: str = "oxillama demo 6M",
    description: str = DESCRIPTION,
) -> None:
    """Write the model: two-dimensional tensors as Q8_0, the rest as F32."""
    tensors = gguf_tensors(model)
    writer = gguf.GGUFWriter(path, "llama")
    parameters = sum(array.size for array in tensors.values())
    _add_metadata(writer, model.config, parameters, name, description)
    _add_tokenizer(writer, tokenizer)
    for name, array in tensors.items():
        if array.ndim == 2:
            packed = gguf.quants.quantize(array, QuantType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=QuantType.Q8_0)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, config: LlamaConfig | None = None) -> LlamaForCausalLM:
    """The model back from its file, with the weights de-quantized to float32."""
    config = config or model_config()
    model = LlamaForCausalLM(config)
    names = _tensor_names(config)
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = _rotated_heads(tensor.name, config)
        array = deinterleave_heads(array, heads) if heads else array
        state[names[tensor.name]] = torch.from_numpy(np.array(array, dtype=np.float32))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    return model.eval()


def verify_gguf(path: Path, model: LlamaForCausalLM) -> float:
    """Read the file back and compare every weight; return the largest error relative to its block's
    largest value.

    Q8_0 rounds to 1/254 of the largest of 32 neighbours; the half-precision scale adds a little.
    """
    worst = 0.0
    stored = dict(read_gguf(path, model.config).state_dict())
    for name, weight in model.state_dict().items():
        blocks = weight.detach().float().reshape(-1, 32)
        error = (stored[name].reshape(-1, 32) - blocks).abs().amax(1)
        worst = max(worst, float((error / blocks.abs().amax(1).clamp_min(1e-20)).max()))
    if worst > 1 / 254 + 1 / 1024:
        raise ValueError(f"{path}: a weight differs by {worst:.4f} of its block's largest value")
    return worst
