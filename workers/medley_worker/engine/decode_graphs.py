"""Captured decode steps: one CUDA graph for each (row bucket, LoRA or none), all in one pool of memory.

It knows no rows and no requests: a graph reads its inputs and writes its results at fixed places, which are its
owner's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class DecodeGraphs:
    """Graphs replay in the order of one stream, so they share the memory of what lives within a step."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # Torch keeps cuBLAS's workspaces by stream and may drop a stream's with any graph that was captured on it, so
        # none is shared with another engine's graphs (pytorch/pytorch#193402).
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}

    def has(self, bucket: int, has_lora: bool) -> bool:
        return (bucket, has_lora) in self._graphs

    def capture(self, bucket: int, has_lora: bool, compute: Callable[[], None]) -> None:
        """Record what `compute` launches. It has run once before, so that all it needs is built and loaded."""
        graph = torch.cuda.CUDAGraph()
        # Threads that load adapters may allocate and copy meanwhile; this thread alone is captured.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            compute()
        self._graphs[bucket, has_lora] = graph

    def replay(self, bucket: int, has_lora: bool) -> None:
        """Launch on the current stream what was captured."""
        self._graphs[bucket, has_lora].replay()

    def clear(self) -> None:
        """Let go of all graphs."""
        self._graphs.clear()
