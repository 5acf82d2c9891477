"""The operators that a decoder is made of, as one interface with an implementation a device.

It knows shapes and one step's plan; no weights, no layers' order, no requests.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from medley.spec.base_models import BaseModel
from medley_worker.ops.activation import silu_mul
from medley_worker.ops.attention import AttentionPlan, append_kv, paged_attention
from medley_worker.ops.linear import linear
from medley_worker.ops.lora import LoraBatch, lora_apply
from medley_worker.ops.norms import rms_norm
from medley_worker.ops.paged import PagedPlan
from medley_worker.ops.rope import apply_rope, rope_angles, rope_frequencies

StepPlan = AttentionPlan | PagedPlan
LayerCache = tuple[Tensor, Tensor]  # K and V of one layer, in the device's layout (models/kv.py)


class Backend(Protocol):
    """One device's operators for one model. T tokens, n = Hq + 2 Hkv heads."""

    def rope(self, positions: Tensor) -> tuple[Tensor, ...]:
        """What every layer's `attention` of a step needs to turn q and k. positions: [T]."""
        ...

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Semantics: y[t] = weight[token_ids[t]]. Returns a new [T, H]."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Semantics: y = x / sqrt(mean(x^2) + eps) * weight. x: [T, H]. Returns a new [T, H]."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        """Semantics: residual += x; y = rms_norm(residual). Both [T, H]; both may be mutated. Returns y."""
        ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Semantics: y = x @ weight + bias. x: [T, K], weight: [K, N]. Returns a new [T, N]."""
        ...

    def logits(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Semantics: y = x @ weight, in float32. x: [R, H], weight: [H, V]. Returns `out` where given, [R, V]."""
        ...

    def lora_apply(self, y: Tensor, x: Tensor, group: str, layer: int, lora: object | None) -> None:
        """Semantics: y[t] += scale * (x[t] @ A) @ B with the adapter of row t. y: [T, sum of out], mutated."""
        ...

    def attention(
        self,
        qkv: Tensor,
        qk_norm: Tensor | None,
        rope: tuple[Tensor, ...],
        cache: LayerCache,
        plan: StepPlan,
        window: int | None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Normalise and turn q and k, append k and v to the cache, attend. Returns [T, Hq D], `out` where given.

        qkv: [T, n D], may be mutated. qk_norm: [Hq + Hkv, D] or None. window: keys a query sees; None: all.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """Semantics: y = silu(gate) * up. gate_up: [T, 2 F]. Returns [T, F]."""
        ...


class CpuBackend:
    """Torch's own operators, chosen so that a row's bits do not depend on its neighbours."""

    def __init__(self, config: BaseModel, dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype
        self._frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)

    def rope(self, positions: Tensor) -> tuple[Tensor, ...]:
        return rope_angles(positions, self._frequencies, self._dtype)

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(token_ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self._config.rms_norm_eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        residual += x
        return rms_norm(residual, weight, self._config.rms_norm_eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias)

    def logits(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        y = linear(x, weight)
        return y.to(torch.float32) if out is None else out.copy_(y)

    def lora_apply(self, y: Tensor, x: Tensor, group: str, layer: int, lora: object | None) -> None:
        assert lora is None or isinstance(lora, LoraBatch)
        lora_apply(y, x, group, layer, lora)

    def attention(
        self,
        qkv: Tensor,
        qk_norm: Tensor | None,
        rope: tuple[Tensor, ...],
        cache: LayerCache,
        plan: StepPlan,
        window: int | None,
        out: Tensor | None = None,
    ) -> Tensor:
        assert isinstance(plan, AttentionPlan)
        config = self._config
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, config.head_dim)
        qk, v = heads[:, : num_heads + num_kv_heads], heads[:, num_heads + num_kv_heads :]
        if qk_norm is not None:
            qk = rms_norm(qk, qk_norm, config.rms_norm_eps)
        cos, sin = rope
        qk = apply_rope(qk, cos, sin)
        q, k = qk[:, :num_heads].contiguous(), qk[:, num_heads:]
        append_kv(k, v, *cache, plan)
        y = paged_attention(q, *cache, plan, window)
        return y if out is None else out.copy_(y)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return silu_mul(gate_up)


def new_backend(config: BaseModel, dtype: torch.dtype, device: torch.device) -> Backend:
    """The operators of `device` for a model in `dtype`."""
    if device.type == "cuda":
        # FlashInfer is installed where there is CUDA.
        from medley_worker.ops.backend_cuda import CudaBackend

        return CudaBackend(config, device)
    return CpuBackend(config, dtype)
