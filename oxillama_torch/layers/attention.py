"""Self-attention over paged keys and values, and the batch that layers work on.

B requests, T tokens of all of them, D hidden size, H query heads, M key/value heads,
P pages of S tokens, L pages per request.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from oxillama_torch.kernels.attention.op import attention
from oxillama_torch.layers.linear import LinearGroup, QuantLinear
from oxillama_torch.layers.lora import AdapterBatch
from oxillama_torch.layers.rope import HeadNorms, RotaryEmbedding

__all__ = ["Attention", "ForwardBatch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """The tokens of one step: some requests bring a chunk of their prompt, others one token.

    Args:
        input_ids: int64 [T], requests one after the other.
        positions: int64 [T], index of each token in its request.
        slot_mapping: int64 [T], page * S + offset where a token's key and value go; -1: nowhere.
        page_table: int32 [B, L], pages of each request in order; entries past its end are unused.
        query_start: int32 [B + 1], where each request's tokens begin in T; the last entry is T.
        seq_lens: int32 [B], tokens of each request so far, those of this step included.
        max_query_len: most tokens any request brings in this step.
        max_seq_len: largest of ``seq_lens``.
        logits_rows: int64 [R], tokens whose logits are wanted.
        adapters: of the tokens that have any; None: no token has.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    page_table: Tensor
    query_start: Tensor
    seq_lens: Tensor
    max_query_len: int
    max_seq_len: int
    logits_rows: Tensor
    adapters: AdapterBatch | None = None


class Attention(nn.Module):
    """``y = W_o softmax(scale * q k^T) v``, causal, with grouped heads and rotated q and k.

    Args:
        qkv: three layers, D -> H * head size and twice D -> M * head size.
        output: H * head size -> D.
        rope: rotation, shared by the layers.
        num_heads, num_kv_heads: H and M, M divides H.
        scale: factor of the scores.
        window: tokens seen, the current one included; None: all.
        norms: of each query and key head before the rotation; None: not normed.
        numerics: ``"invariant"`` or ``"fast"``.
    """

    def __init__(
        self,
        *,
        qkv: LinearGroup,
        output: QuantLinear,
        rope: RotaryEmbedding,
        num_heads: int,
        num_kv_heads: int,
        scale: float,
        window: int | None = None,
        norms: HeadNorms | None = None,
        numerics: str = "invariant",
    ) -> None:
        super().__init__()
        self.qkv, self.output = qkv, output
        self.rope, self.norms = rope, norms
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.scale, self.window = scale, window
        self.numerics = numerics

    def forward(self, x_TD: Tensor, batch: ForwardBatch, kv: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv(x_TD, batch.adapters)
        q = q.unflatten(1, (self.num_heads, -1))
        k = k.unflatten(1, (self.num_kv_heads, -1))
        v = v.unflatten(1, (self.num_kv_heads, -1))
        q = self.rope(q, k, v, batch.positions, kv, batch.slot_mapping, self.norms)
        y = attention(
            q, *kv, batch.page_table, batch.query_start, batch.seq_lens,
            scale=self.scale, window=self.window, numerics=self.numerics,
            max_query_len=batch.max_query_len, max_seq_len=batch.max_seq_len,
        )  # fmt: skip
        return self.output(y.flatten(1), batch.adapters)

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window {self.window}"
        return f"{self.num_heads} heads, {self.num_kv_heads} for keys and values{window}"
