"""Times of device work: a captured graph's replays by events, from a cold L2. Knows no kernels."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

# Read before every replay: it empties the L2 (50 MB on H100 and H200) of what the replay before left there, as
# the base model's weights do between two LoRA sites of a real step; and while it runs, the host is done enqueueing.
FLUSH_BYTES = 512 << 20


def timed_event() -> torch.cuda.Event:
    """An event that knows when it was reached."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


class GraphTimer:
    """Captures work once and times its replays."""

    def __init__(self) -> None:
        self._flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")

    def capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """`work` as a graph; it runs once before, so that nothing is built or allocated while capturing."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        torch.cuda.synchronize()
        return graph

    def replay_ms(self, graph: torch.cuda.CUDAGraph, *, replays: int = 30, warm_up: int = 3) -> float:
        """The median replay, in ms."""
        pairs = []
        for number in range(warm_up + replays):
            begin, end = timed_event(), timed_event()
            self._flush.sum()
            begin.record()
            graph.replay()
            end.record()
            if number >= warm_up:
                pairs.append((begin, end))
        torch.cuda.synchronize()
        return statistics.median(float(begin.elapsed_time(end)) for begin, end in pairs)
