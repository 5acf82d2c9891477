"""The Llama family's decoder: Llama, Mistral, Qwen2 and Qwen3 differ by a few flags of their configuration.

Owns packed weights and the forward pass. It does not know files, requests or whose adapters run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from medley.spec.base_models import BaseModel
from medley_worker.models.batch import ForwardBatch
from medley_worker.models.kv import PAGE_SIZE, KVCache
from medley_worker.ops.activation import silu_mul
from medley_worker.ops.attention import append_kv, paged_attention
from medley_worker.ops.linear import linear
from medley_worker.ops.lora import lora_apply
from medley_worker.ops.norms import rms_norm
from medley_worker.ops.rope import apply_rope, rope_angles, rope_frequencies


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, in the model's dtype; linear weights are [in, out]. D: head size, n: query and key heads."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [H, (Hq + 2 Hkv) D]
    qkv_bias: Tensor | None  # [(Hq + 2 Hkv) D]
    qk_norm: Tensor | None  # [n, D], a head's norm weight repeated for each head
    o: Tensor  # [Hq D, H]
    post_norm: Tensor  # [H]
    gate_up: Tensor  # [H, 2 F], gate first
    down: Tensor  # [F, H]


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    embedding: Tensor  # [V, H]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [H]
    lm_head: Tensor  # [H, V]


class Decoder:
    """A loaded model: `forward` turns one step's tokens into logits and writes their keys and values."""

    def __init__(self, config: BaseModel, weights: DecoderWeights) -> None:
        self.config = config
        self._weights = weights
        self.dtype, self.device = weights.embedding.dtype, weights.embedding.device
        self._frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling).to(self.device)

    def new_kv_cache(self, num_pages: int, page_size: int = PAGE_SIZE) -> KVCache:
        """An empty cache of this model's shape, dtype and device."""
        return KVCache(
            num_layers=self.config.num_layers,
            num_pages=num_pages,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            device=self.device,
            page_size=page_size,
        )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVCache) -> Tensor:
        """Logits [R, V] float32 of `batch.logit_rows`. Writes the new tokens' keys and values into `kv`."""
        if batch.attention.fresh_pages is not None:
            kv.clear(batch.attention.fresh_pages)
        cos, sin = rope_angles(batch.positions, self._frequencies, self.dtype)
        x = F.embedding(batch.token_ids, self._weights.embedding)  # [T, H]
        eps = self.config.rms_norm_eps
        for index, layer in enumerate(self._weights.layers):
            x = x + self._attention(rms_norm(x, layer.input_norm, eps), index, layer, batch, kv, cos, sin)
            x += self._mlp(rms_norm(x, layer.post_norm, eps), index, layer, batch)
        x = rms_norm(x.index_select(0, batch.logit_rows), self._weights.final_norm, eps)
        return linear(x, self._weights.lm_head).to(torch.float32)

    def _attention(
        self, x: Tensor, index: int, layer: LayerWeights, batch: ForwardBatch, kv: KVCache, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Attention of layer `index` with its projections. x: [T, H]. Returns [T, H]."""
        config = self.config
        qkv = linear(x, layer.qkv, layer.qkv_bias)
        lora_apply(qkv, x, "qkv", index, batch.lora)
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, config.head_dim)
        qk, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
        if layer.qk_norm is not None:
            qk = rms_norm(qk, layer.qk_norm, config.rms_norm_eps)
        qk = apply_rope(qk, cos, sin)
        q, k = qk[:, :num_heads].contiguous(), qk[:, num_heads:]
        append_kv(k, v, kv.k[index], kv.v[index], batch.attention)
        y = paged_attention(q, kv.k[index], kv.v[index], batch.attention, config.layer_windows[index])
        out = linear(y, layer.o)
        lora_apply(out, y, "o", index, batch.lora)
        return out

    def _mlp(self, x: Tensor, index: int, layer: LayerWeights, batch: ForwardBatch) -> Tensor:
        """The gated MLP of layer `index`. x: [T, H]. Returns [T, H]."""
        gate_up = linear(x, layer.gate_up)
        lora_apply(gate_up, x, "gate_up", index, batch.lora)
        inner = silu_mul(gate_up)
        out = linear(inner, layer.down)
        lora_apply(out, inner, "down", index, batch.lora)
        return out
