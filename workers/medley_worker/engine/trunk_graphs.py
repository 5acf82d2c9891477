"""Captured steps with prompt chunks: what lies between two attentions is a CUDA graph, attention runs between them.

One run of graphs for each (token bucket, LoRA or none), all in one pool of memory. Tokens beyond a step's are whatever
lies there: no row reads another's outside of attention, and attention is of a step's own tokens alone. It knows no
sequences and no pages.

| memory | written by | read by |
| token ids | a replay, before its first graph | that graph |
| qkv of a layer | the graph before its attention | attention |
| y of a layer | attention | the graph after it |
| x, residual | graphs; as the last one left them | the replay's caller, until the next replay |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from medley_worker.engine.step_inputs import bucket_for
from medley_worker.models import Decoder
from medley_worker.models.decoder import Attend, run_pieces
from medley_worker.ops.memory_cuda import borrowed


@dataclass(frozen=True, slots=True)
class Stop:
    """A graph, and the attention that is due after it. qkv: [bucket, n D], y: [bucket, Hq D]."""

    graph: torch.cuda.CUDAGraph
    layer: int
    qkv: Tensor
    y: Tensor


@dataclass(frozen=True, slots=True)
class Run:
    """A trunk of one bucket. x, residual: [bucket, H]."""

    stops: tuple[Stop, ...]
    last: torch.cuda.CUDAGraph
    x: Tensor
    residual: Tensor


class TrunkGraphs:
    """Runs replay in the order of one stream, so they share the memory of what lives within a step.

    buckets: ascending numbers of tokens.
    """

    def __init__(self, decoder: Decoder, buckets: Sequence[int]) -> None:
        self._decoder, self._buckets = decoder, buckets
        self._token_ids = torch.zeros(buckets[-1], dtype=torch.int64, device=decoder.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(decoder.device)  # type: ignore[no-untyped-call]  # see DecodeGraphs
        self._runs: dict[tuple[int, bool], Run] = {}

    def has(self, num_tokens: int, has_lora: bool) -> bool:
        """Whether a step of so many tokens can be replayed."""
        return num_tokens <= self._buckets[-1] and (bucket_for(self._buckets, num_tokens), has_lora) in self._runs

    def capture(self, lora: object | None) -> None:
        """Record the runs of every bucket, the largest first. lora: what each will read of adapters, or None."""
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            for bucket in reversed(self._buckets):
                self._runs[bucket, lora is not None] = self._record(self._token_ids[:bucket], lora)
        torch.cuda.synchronize()

    def replay(self, token_ids: Tensor, has_lora: bool, attend: Attend) -> tuple[Tensor, Tensor]:
        """The trunk of a step with token_ids [T] int64, on the current stream: (x, residual), [T, H] each."""
        num_tokens = len(token_ids)
        run = self._runs[bucket_for(self._buckets, num_tokens), has_lora]
        self._token_ids[:num_tokens].copy_(token_ids)
        for stop in run.stops:
            stop.graph.replay()
            attend(stop.layer, stop.qkv[:num_tokens], stop.y[:num_tokens])
        run.last.replay()
        return run.x[:num_tokens], run.residual[:num_tokens]

    def clear(self) -> None:
        """Let go of all graphs."""
        self._runs.clear()

    def _record(self, token_ids: Tensor, lora: object | None) -> Run:
        # A rehearsal, so that all that is captured is built and loaded. What it computes is of no use.
        run_pieces(self._decoder.pieces(token_ids, lora), lambda _, qkv: self._new_y(qkv))
        pieces = self._decoder.pieces(token_ids, lora)
        y, stops = None, []
        while True:
            graph = torch.cuda.CUDAGraph()
            with self._captured(graph):
                try:
                    layer, qkv = next(pieces) if y is None else pieces.send(y)
                    y = self._new_y(qkv)
                except StopIteration as end:
                    x, residual = end.value
                    break
            # Later graphs may have this memory once it is done with, so nobody holds on to it.
            stops.append(Stop(graph, layer, borrowed(qkv), borrowed(y)))
        return Run(tuple(stops), graph, borrowed(x), borrowed(residual))

    def _new_y(self, qkv: Tensor) -> Tensor:
        config = self._decoder.config
        return qkv.new_empty((len(qkv), config.num_heads * config.head_dim))

    @contextmanager
    def _captured(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # Threads that load adapters may allocate and copy meanwhile; this thread alone is captured.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()
