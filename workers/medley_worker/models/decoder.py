"""The Llama family's decoder: Llama, Mistral, Qwen2 and Qwen3 differ by a few flags of their configuration.

Owns packed weights and the forward pass. It does not know files, requests or whose adapters run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from medley_worker.models.batch import ForwardBatch
from medley_worker.models.kv import KVCache, kv_page_size
from medley_worker.models.sharding import Shard
from medley_worker.ops.backend import new_backend
from medley_worker.ops.collectives import Alone, Collectives
from medley_worker.ops.memory import Memory


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, in the model's dtype. D: head size, n: query and key heads.

    Linear weights are [in, out], in the order in which the device reads them best (models/loading.py).
    """

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
    """Embedding, last norm and LM head are None on all ranks but the first."""

    embedding: Tensor | None  # [V, H]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor | None  # [H]
    lm_head: Tensor | None  # [H, V]


# Yields (layer, its qkv [T, n D]) where attention is due and is sent [T, Hq D]; returns (x, residual), [T, H] each.
Pieces = Generator[tuple[int, Tensor], Tensor, tuple[Tensor, Tensor]]


class Attend(Protocol):
    """One step's attention. Appends the new keys and values of layer `index` to the cache."""

    def __call__(self, index: int, qkv: Tensor, out: Tensor | None = None) -> Tensor:
        """qkv: [T, n D], may be mutated. Returns [T, Hq D], `out` where given."""
        ...


def run_pieces(pieces: Pieces, attend: Callable[[int, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Run all pieces, with attend(layer, qkv) between them. Returns what the last one does."""
    try:
        at = next(pieces)
        while True:
            at = pieces.send(attend(*at))
    except StopIteration as end:
        found: tuple[Tensor, Tensor] = end.value
        return found


class Decoder:
    """A loaded model: `forward` turns one step's tokens into logits and writes their keys and values.

    Of a model that several ranks share, this is one rank's part, `config` the part's shape. Every rank runs `trunk` on
    the same step; tokens go in and logits come out on the first rank alone.
    """

    def __init__(self, shard: Shard, weights: DecoderWeights) -> None:
        self.shard, self.config = shard, shard.part
        self._weights = weights
        self._ranks: Collectives = Alone()
        self.dtype, self.device = weights.layers[0].qkv.dtype, weights.layers[0].qkv.device
        self._ops = new_backend(self.config, self.dtype, self.device)

    def join(self, ranks: Collectives) -> None:
        """Compute with these others from now on."""
        self._ranks = ranks

    def new_kv_cache(self, num_pages: int, page_size: int | None = None, memory: Memory | None = None) -> KVCache:
        """An empty cache of this model's shape, dtype and device. page_size: tokens; None: the device's own.

        memory: where it lies on the device; None: torch's own.
        """
        return KVCache(
            num_layers=self.config.num_layers,
            num_pages=num_pages,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            device=self.device,
            page_size=kv_page_size(self.device) if page_size is None else page_size,
            memory=memory,
        )

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: KVCache, out: Tensor | None = None) -> Tensor:
        """Logits [R, V] float32 of `batch.logit_rows`. Writes the new tokens' keys and values into `kv`.

        out: [R, V] float32, written and returned where given.
        """
        return self.head(*self.trunk(batch, kv), batch.logit_rows, out)

    @torch.inference_mode()
    def trunk(self, batch: ForwardBatch, kv: KVCache) -> tuple[Tensor, Tensor]:
        """What `head` makes logits of: (the last layer's output, the residual), [T, H] each. Writes into `kv`."""
        return run_pieces(self.pieces(batch.token_ids, batch.lora), self.attention(batch, kv))

    def pieces(self, token_ids: Tensor, lora: object | None) -> Pieces:
        """The trunk but for attention, where it stops in each layer. What lies between knows no sequences and no pages.

        token_ids: [T] int64.
        """
        ops, weights = self._ops, self._weights
        residual = self._embed(token_ids)  # [T, H]
        x = ops.rms_norm(residual, weights.layers[0].input_norm)
        for index, layer in enumerate(weights.layers):
            if index > 0:
                x = ops.add_rms_norm(x, residual, layer.input_norm)
            qkv = ops.linear(x, layer.qkv, layer.qkv_bias)
            ops.lora_apply(qkv, x, "qkv", index, lora)
            y = yield index, qkv
            x = self._project(y, index, layer, lora)
            x = ops.add_rms_norm(x, residual, layer.post_norm)
            x = self._mlp(x, index, layer, lora)
        return x, residual

    def attention(self, batch: ForwardBatch, kv: KVCache) -> Attend:
        """What computes the attention of `batch`, layer by layer."""
        if batch.attention.fresh_pages is not None:
            kv.clear(batch.attention.fresh_pages)
        ops, layers, windows = self._ops, self._weights.layers, self.config.layer_windows
        rope = ops.rope(batch.positions)

        def attend(index: int, qkv: Tensor, out: Tensor | None = None) -> Tensor:
            cache = (kv.k[index], kv.v[index])
            return ops.attention(qkv, layers[index].qk_norm, rope, cache, batch.attention, windows[index], out)

        return attend

    @torch.inference_mode()
    def head(self, x: Tensor, residual: Tensor, rows: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Logits [R, V] float32 of `rows` ([R] int) of a trunk's [T, H].

        rows: None takes all, once, as x and residual may be mutated then. out: [R, V] float32, written and returned
        where given.
        """
        ops, weights = self._ops, self._weights
        final_norm, lm_head = weights.final_norm, weights.lm_head
        assert final_norm is not None, "the first rank has the head"
        assert lm_head is not None, "the first rank has the head"
        if rows is not None:
            if len(rows) == 0:
                return x.new_empty((0, self.config.vocab_size), dtype=torch.float32)
            x, residual = x.index_select(0, rows), residual.index_select(0, rows)
        x = ops.add_rms_norm(x, residual, final_norm)
        return ops.logits(x, lm_head, out)

    def _embed(self, token_ids: Tensor) -> Tensor:
        """[T, H] on every rank; the others need no tokens, only how many there are."""
        weight = self._weights.embedding
        if weight is not None:
            x = self._ops.embed(token_ids, weight)
        else:
            x = torch.empty((len(token_ids), self.config.hidden_size), dtype=self.dtype, device=self.device)
        self._ranks.spread(x)
        return x

    def _project(self, y: Tensor, index: int, layer: LayerWeights, lora: object | None) -> Tensor:
        """The output projection of attention's y, [T, Hq D]. Returns [T, H]."""
        ops = self._ops
        out = ops.linear(y, layer.o)
        # A rank's part of the update goes into its part of the product, so that one sum is of both.
        ops.lora_apply(out, y, "o", index, lora)
        self._ranks.add(out)
        return out

    def _mlp(self, x: Tensor, index: int, layer: LayerWeights, lora: object | None) -> Tensor:
        """The gated MLP of layer `index`. x: [T, H]. Returns [T, H]."""
        ops = self._ops
        gate_up = ops.linear(x, layer.gate_up)
        ops.lora_apply(gate_up, x, "gate_up", index, lora)
        inner = ops.silu_mul(gate_up)
        out = ops.linear(inner, layer.down)
        ops.lora_apply(out, inner, "down", index, lora)
        self._ranks.add(out)
        return out
