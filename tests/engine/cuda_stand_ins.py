"""Plain torch in the place of FlashInfer, graphs and events, so that steps for CUDA run on a CPU in float32.

The kernels themselves are judged on a device (tests/kernels); here what is judged is what they are given.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from medley_worker.engine.adapter_memory import AdapterMemory
from medley_worker.engine.adapters import AdapterCache
from medley_worker.engine.parallel.follower import Follower
from medley_worker.engine.parallel.followers import Followers
from medley_worker.engine.rows import RowTable
from medley_worker.engine.scheduler import Scheduler
from medley_worker.engine.sizing import EngineSizes
from medley_worker.engine.step_inputs import bucket_for
from medley_worker.models import Decoder, KVCache
from medley_worker.models.decoder import Attend, run_pieces
from medley_worker.ops.lora import LoraBatch, lora_apply
from medley_worker.ops.sgmv import SMALL_ROWS

LOADED_WITH_CUDA = (
    "medley_worker.engine.cuda_forward",
    "medley_worker.engine.cuda_passes",
    "medley_worker.ops.backend_cuda",
    "medley_worker.ops.paged_attention",
)
Cache = tuple[Tensor, Tensor]


def rmsnorm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    return y if out is None else out.copy_(y)


def fused_add_rmsnorm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    residual.add_(x)
    x.copy_(rmsnorm(residual, weight, eps))


def silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def apply_rope_with_cos_sin_cache_inplace(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor
) -> None:
    assert positions.dtype == torch.int32
    half = head_size // 2
    cos, sin = cos_sin_cache.index_select(0, positions).unsqueeze(1).split(half, -1)
    for heads in (query, key):
        low, high = heads[..., :half].clone(), heads[..., half:].clone()
        heads[..., :half] = low * cos - high * sin
        heads[..., half:] = high * cos + low * sin


def append_paged_kv_cache(
    k: Tensor,
    v: Tensor,
    sequences: Tensor,
    positions: Tensor,
    cache: Cache,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    last_page_len: Tensor,
) -> None:
    assert {t.dtype for t in (sequences, positions, kv_indices, kv_indptr, last_page_len)} == {torch.int32}
    assert len(kv_indptr) == len(last_page_len) + 1
    page_size = cache[0].shape[1]
    pages = kv_indices[kv_indptr[sequences] + positions // page_size]
    for pool, values in zip(cache, (k, v), strict=True):
        pool[pages, positions % page_size] = values


def attend(q: Tensor, cache: Cache, held: tuple[Tensor, ...], ends: Sequence[int], left: int, out: Tensor) -> None:
    """q of sequence i: rows ends[i] to ends[i + 1]; held: kv_indptr, kv_indices, last_page_len."""
    kv_indptr, kv_indices, last_page_len = held
    for i, (start, end) in enumerate(pairwise(ends)):
        pages = kv_indices[int(kv_indptr[i]) : int(kv_indptr[i + 1])]
        length = (len(pages) - 1) * cache[0].shape[1] + int(last_page_len[i])
        group = q.shape[1] // cache[0].shape[2]
        k, v = (pool[pages].flatten(0, 1)[:length].repeat_interleave(group, 1) for pool in cache)
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k) / math.sqrt(q.shape[-1])
        queries = torch.arange(length - (end - start), length).unsqueeze(1)
        keys = torch.arange(length)
        is_hidden = keys > queries if left < 0 else (keys > queries) | (keys < queries - left)
        out[start:end] = torch.einsum("hqk,khd->qhd", scores.masked_fill(is_hidden, -math.inf).softmax(-1), v)


class DecodeWrapper:
    """Reads the device's arrays where they lie, and checks that its plan was of the same step."""

    def __init__(
        self,
        workspace: Tensor,
        layout: str,
        *,
        use_cuda_graph: bool,
        use_tensor_cores: bool,
        paged_kv_indptr_buffer: Tensor,
        paged_kv_indices_buffer: Tensor,
        paged_kv_last_page_len_buffer: Tensor,
    ) -> None:
        del workspace, use_tensor_cores
        assert use_cuda_graph
        assert layout == "NHD"
        self.held = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        assert len(self.held[0]) == len(self.held[2]) + 1
        self.planned: tuple[Tensor, Tensor] | None = None

    def plan(self, *_: object, window_left: int, **__: object) -> None:
        self.left = window_left

    def run(self, q: Tensor, cache: Cache, *, out: Tensor) -> Tensor:
        assert self.planned is not None
        assert torch.equal(self.planned[0], self.held[0])
        assert torch.equal(self.planned[1], self.held[2])
        attend(q, cache, self.held, range(len(q) + 1), self.left, out)
        return out


def fast_decode_plan(
    wrapper: DecodeWrapper, indptr: Tensor, indices: Tensor, last_page_len: Tensor, *_: int, **__: object
) -> None:
    assert len(indices) <= len(wrapper.held[1])
    wrapper.planned = indptr.clone(), last_page_len.clone()


class PrefillWrapper:
    def __init__(self, *_: object, backend: str) -> None:
        del backend

    def plan(
        self,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        last_page_len: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        causal: bool,
        window_left: int,
        seq_lens: Tensor,
        **_: object,
    ) -> None:
        del num_heads, num_kv_heads, head_dim
        assert causal
        assert torch.equal((kv_indptr.diff() - 1) * page_size + last_page_len, seq_lens)
        self.ends, self.left = qo_indptr.tolist(), window_left
        self.held = (kv_indptr.clone(), kv_indices, last_page_len.clone())

    def run(self, q: Tensor, cache: Cache, *, out: Tensor) -> Tensor:
        assert len(q) == self.ends[-1]
        attend(q, cache, self.held, self.ends, self.left, out)
        return out


def greedy(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, is_bad: Tensor, rows: Tensor, last_token: Tensor
) -> None:
    token_ids.copy_(logits.argmax(-1))
    total = logits.logsumexp(-1)
    logprobs.copy_(logits.gather(1, token_ids.unsqueeze(1)).squeeze(1) - total)
    is_bad.copy_(~total.isfinite())
    last_token.index_copy_(0, rows, token_ids)


class Graphs:
    """A replay computes again what was captured, from what lies at its inputs' places then."""

    def __init__(self, _: torch.device) -> None:
        self.captured: dict[tuple[int, bool], Callable[[], None]] = {}

    def has(self, bucket: int, has_lora: bool) -> bool:
        return (bucket, has_lora) in self.captured

    def capture(self, bucket: int, has_lora: bool, compute: Callable[[], None]) -> None:
        self.captured[bucket, has_lora] = compute

    def replay(self, bucket: int, has_lora: bool) -> None:
        self.captured[bucket, has_lora]()

    def clear(self) -> None:
        self.captured.clear()


class TrunkGraphs:
    """A replay computes the padded run again, from what lies at its inputs' places then."""

    def __init__(self, decoder: Decoder, buckets: Sequence[int]) -> None:
        self.decoder, self.buckets = decoder, buckets
        self.token_ids = torch.zeros(buckets[-1], dtype=torch.int64)

    def has(self, num_tokens: int, has_lora: bool) -> bool:
        del has_lora
        return num_tokens <= self.buckets[-1]

    def capture(self, lora: object | None) -> None: ...

    def clear(self) -> None: ...

    def replay(self, token_ids: Tensor, has_lora: bool, attend: Attend) -> tuple[Tensor, Tensor]:
        num_tokens = len(token_ids)
        self.token_ids[:num_tokens] = token_ids
        padded = self.token_ids[: bucket_for(self.buckets, num_tokens)]
        pieces = self.decoder.pieces(padded, WorkList({}, 0) if has_lora else None)
        config = self.decoder.config

        def attend_padded(layer: int, qkv: Tensor) -> Tensor:
            y = torch.full((len(padded), config.num_heads * config.head_dim), math.nan)
            attend(layer, qkv[:num_tokens], y[:num_tokens])
            return y

        x, residual = run_pieces(pieces, attend_padded)
        return x[:num_tokens], residual[:num_tokens]


def flashinfer() -> ModuleType:
    module: Any = ModuleType("flashinfer")
    for name in ("rmsnorm", "fused_add_rmsnorm", "silu_and_mul", "fast_decode_plan", "append_paged_kv_cache"):
        setattr(module, name, globals()[name])
    module.apply_rope_with_cos_sin_cache_inplace = apply_rope_with_cos_sin_cache_inplace
    module.BatchDecodeWithPagedKVCacheWrapper = DecodeWrapper
    module.BatchPrefillWithPagedKVCacheWrapper = PrefillWrapper
    stand_in: ModuleType = module
    return stand_in


@dataclass(frozen=True, slots=True)
class WorkList(LoraBatch):
    """`SgmvBatch`: LoraBatch, with items of one size."""

    block_rows: int = SMALL_ROWS


class Latest(threading.local):
    """The work list that is in place on a thread's device, and of how many tokens it is."""

    batch: WorkList | None = None
    num_tokens = 0


def logits(_: object, x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    y = torch.mm(x, weight).to(torch.float32)
    return y if out is None else out.copy_(y)


class Event:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def stand_in_for_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", lambda *_: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)


@contextmanager
def cuda_forward(
    monkeypatch: pytest.MonkeyPatch, max_tokens: int, is_invariant: bool = False
) -> Iterator[Callable[..., Any]]:
    """Within it: a function with ModelForward's arguments that gives a CudaForward of stand-ins."""
    stand_in_for_device(monkeypatch)
    for name in LOADED_WITH_CUDA:
        sys.modules.pop(name, None)
    forward, passes, backend, attention = (import_module(name) for name in LOADED_WITH_CUDA)
    latest = Latest()

    def sgmv_apply(y: Tensor, x: Tensor, group: str, layer: int, _: object) -> None:
        # As the kernel does: whatever work list is in place, and nothing of rows beyond it.
        lora_apply(y[: latest.num_tokens], x[: latest.num_tokens], group, layer, latest.batch)

    for module in (forward, passes, backend):
        monkeypatch.setattr(module, "SgmvBatch", WorkList)
    monkeypatch.setattr(backend, "sgmv_apply", sgmv_apply)
    monkeypatch.setattr(backend.CudaBackend, "logits", logits)
    monkeypatch.setattr(forward, "greedy", greedy)
    monkeypatch.setattr(passes, "DecodeGraphs", Graphs)
    monkeypatch.setattr(passes, "TrunkGraphs", TrunkGraphs)
    monkeypatch.setattr(attention, "check_supported", lambda *_: None)

    def prepare(decoder: Decoder, kv: KVCache, cache: AdapterCache | AdapterMemory) -> Any:
        """The device's operators and cache for a decoder; what is in its adapters' place is kept."""
        config = decoder.config
        decoder._ops = backend.CudaBackend(config, decoder.device)
        shape = (config.num_layers, kv.num_pages + 1, 2, kv.page_size, config.num_kv_heads, config.head_dim)
        pages = torch.zeros(shape).unbind(2)
        sizes = {"num_pages": kv.num_pages, "page_size": kv.page_size, "spare_page": kv.num_pages}
        lora_batch = cache.lora_batch

        def kept_lora_batch(keys: Any, num_tokens: Any, **options: bool) -> Any:
            batch = cast(LoraBatch | None, lora_batch(keys, num_tokens, **options))
            latest.batch = None if batch is None else WorkList(batch.groups, batch.num_adapters)
            latest.num_tokens = sum(num_tokens)
            return latest.batch

        monkeypatch.setattr(cache, "lora_batch", kept_lora_batch)
        return SimpleNamespace(k=pages[0].unbind(0), v=pages[1].unbind(0), **sizes)

    def build_follower(follower: Follower, kv: KVCache, sizes: EngineSizes) -> Any:
        return passes.CudaFollowerPasses(
            follower._decoder,
            prepare(follower._decoder, kv, follower._adapters),
            follower._adapters,
            follower._memory,
            num_rows=sizes.max_num_seqs,
            max_row_pages=-(-sizes.max_model_len // sizes.page_size),
            max_tokens=sizes.max_num_batched_tokens,
            is_invariant=is_invariant,
        )

    monkeypatch.setattr(Follower, "_new_passes", build_follower)

    def build(
        decoder: Decoder,
        kv: KVCache,
        cache: AdapterCache,
        rows: RowTable,
        scheduler: Scheduler,
        others: Followers | None,
    ) -> Any:
        given = (decoder, prepare(decoder, kv, cache), cache, rows, scheduler)
        return forward.CudaForward(*given, max_tokens=max_tokens, is_invariant=is_invariant, others=others)

    yield build
    for name in LOADED_WITH_CUDA:
        sys.modules.pop(name, None)
