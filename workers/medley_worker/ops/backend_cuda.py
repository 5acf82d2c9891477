"""The decoder's operators on CUDA: cuBLAS through torch, FlashInfer, and our SGMV. All of them can be captured."""

from __future__ import annotations

import torch
from flashinfer import (
    append_paged_kv_cache,
    apply_rope_with_cos_sin_cache_inplace,
    fused_add_rmsnorm,
    rmsnorm,
    silu_and_mul,
)
from torch import Tensor
from torch.nn import functional as F

from medley.spec.base_models import BaseModel
from medley_worker.ops.backend import LayerCache, StepPlan
from medley_worker.ops.paged import PagedPlan
from medley_worker.ops.rope import cos_sin_cache, rope_frequencies
from medley_worker.ops.sgmv import SgmvBatch, sgmv_apply


class CudaBackend:
    """`backend.Backend` on one CUDA device, bfloat16 or float16; every operator runs on the current stream.

    Making one has torch take cuBLASLt for the products of this process: for tens and hundreds of rows it picks faster
    kernels than cuBLAS does (benchmarks/NOTES.md).
    """

    def __init__(self, config: BaseModel, device: torch.device) -> None:
        torch.backends.cuda.preferred_blas_library("cublaslt")
        self._config = config
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self._cos_sin = cos_sin_cache(frequencies.to(device), config.max_model_len)

    def rope(self, positions: Tensor) -> tuple[Tensor, ...]:
        return (positions,)

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(token_ids, weight)

    def rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = rmsnorm(x, weight, self._config.rms_norm_eps)
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        fused_add_rmsnorm(x, residual, weight, self._config.rms_norm_eps)
        return x

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)

    def logits(self, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            return torch.mm(x, weight, out_dtype=torch.float32)
        return torch.mm(x, weight, out_dtype=torch.float32, out=out)

    def lora_apply(self, y: Tensor, x: Tensor, group: str, layer: int, lora: object | None) -> None:
        if lora is not None:
            assert isinstance(lora, SgmvBatch)
            sgmv_apply(y, x, group, layer, lora)

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
        assert isinstance(plan, PagedPlan)
        config = self._config
        num_heads, num_kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        heads = qkv.view(len(qkv), num_heads + 2 * num_kv_heads, head_dim)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)  # [T, heads, D] views
        if qk_norm is not None:
            rmsnorm(q, qk_norm[0], config.rms_norm_eps, out=q)
            rmsnorm(k, qk_norm[num_heads], config.rms_norm_eps, out=k)
        (positions,) = rope
        apply_rope_with_cos_sin_cache_inplace(positions, q, k, head_dim, self._cos_sin)
        append_paged_kv_cache(
            k, v, plan.sequences, positions, cache, plan.kv_indices, plan.kv_indptr, plan.last_page_len
        )
        out = qkv.new_empty((len(qkv), num_heads * head_dim)) if out is None else out
        y = out.view(len(qkv), num_heads, head_dim)
        split = plan.num_decode_rows
        if split:
            plan.decode[window].run(q[:split], cache, out=y[:split])
        if plan.prefill:
            plan.prefill[window].run(q[split:], cache, out=y[split:])
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        y: Tensor = silu_and_mul(gate_up)
        return y
