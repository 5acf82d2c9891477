"""`lora-path.json`: the LoRA sites of one decode step of the 7B shape alone, in one CUDA graph.

floor_ms: the weight bytes of each adapter, read once, at the bandwidth of `floors`. Rows of an adapter lie side by
side, as the scheduler orders them. in_situ_ms: what the same adapters add to a whole step through the engine, from the
rows of `step.json`; null where it has none (of rank 16 alone, and not of every popularity).
"""

from __future__ import annotations

import itertools
import json
import tempfile
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks.gpu.floors import BANDWIDTH
from benchmarks.gpu.lora_sites import LoraSites, TilesShort
from benchmarks.gpu.peft_files import RANK
from benchmarks.gpu.results import Figure, Run, part_options
from benchmarks.gpu.shapes import base_model
from benchmarks.gpu.timing import GraphTimer
from benchmarks.gpu.workloads import POPULARITIES, adapter_rows
from benchmarks.record import say

# What a row calls its ranks, and the ranks that its adapters take by turns.
RANKS: dict[int | str, tuple[int, ...]] = {16: (16,), 64: (64,), 8: (8,), 128: (128,), "mix": (8, 16, 32, 64)}
MODEL = "7b"
BATCHES = (32, 1, 8, 16, 64, 128, 256)
# 128 adapters of rank 128 take what an H200 has.
MAX_ADAPTER_RANKS = 128 * 128
ROW_S = 3.0  # a row's time at the most

Case = tuple[int | str, int, str]


def cases(figure: Figure) -> list[Case]:
    """(rank, batch, popularity) of the rows that are wanted, those that others are compared by first."""
    return [
        (rank, batch, popularity)
        for rank, batch, popularity in itertools.product(RANKS, BATCHES, POPULARITIES)
        if figure.wants(rank=rank, batch=batch, popularity=popularity)
        and sum(ranks_of(rank, batch, popularity)) <= MAX_ADAPTER_RANKS
    ]


def ranks_of(rank: int | str, batch: int, popularity: str) -> list[int]:
    """The rank of each adapter of a case."""
    turns = RANKS[rank]
    return [turns[i % len(turns)] for i in range(max(adapter_rows(batch, popularity)) + 1)]


def in_situ_ms(steps: Path, rank: int | str, batch: int, popularity: str) -> float | None:
    """A whole step with these adapters less one without, from the file of `step`'s rows."""
    if rank != RANK or not steps.exists():
        return None
    rows = json.loads(steps.read_text())["rows"]
    ms = {row["lora"]: row["ms"] for row in rows if (row["model"], row["batch"]) == (MODEL, batch)}
    return round(ms[popularity] - ms["none"], 3) if {popularity, "none"} <= ms.keys() else None


def add_in_situ(figure: Figure) -> None:
    """Put what whole steps say into every row that is there."""
    steps = figure.path.with_name(figure.path.name.replace("lora-path", "step"))
    for rank, batch, popularity in itertools.product(RANKS, BATCHES, POPULARITIES):
        row = figure.get(rank=rank, batch=batch, popularity=popularity)
        if row is None:
            continue
        found = in_situ_ms(steps, rank, batch, popularity)
        if row["in_situ_ms"] != found:
            figure.put(row | {"in_situ_ms": found})


@click.command()
@part_options
def main(run: Run) -> None:
    """Measure the LoRA path for ranks, batches and popularities."""
    figure = Figure(
        "lora-path",
        ("rank", "batch", "popularity"),
        run,
        notes=["7B shape, 32 layers x 4 launches in one CUDA graph, bf16; the L2 is emptied before each replay"],
    )
    wanted = cases(figure)
    if wanted:
        measure(wanted, run, figure)
    else:
        say(f"{figure.path} has all rows; --again measures them once more")
    add_in_situ(figure)


def measure(wanted: list[Case], run: Run, figure: Figure) -> None:
    """These rows, while the budget lasts."""
    with tempfile.TemporaryDirectory() as folder:
        model = base_model(MODEL, Path(folder))
    most = max(sum(-(-r // 8) for r in ranks_of(*case)) for case in wanted) * 4
    max_batch = max(BATCHES)
    sites = LoraSites(model, num_tiles=most, max_tokens=max_batch, max_adapters=max_batch)
    timer = GraphTimer()
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    for rank, batch, popularity in wanted:
        if not run.has_time_for(ROW_S):
            return
        ranks = ranks_of(rank, batch, popularity)
        try:
            work = sites.upload(ranks, sorted(adapter_rows(batch, popularity)))
        except TilesShort as short:
            say(f"left out: rank {rank}, batch {batch}, {popularity}: {short}")
            continue
        if batch not in graphs:
            graphs[batch] = timer.capture(partial(sites.step, batch, work))
        figure.add(
            {
                "rank": rank,
                "batch": batch,
                "popularity": popularity,
                "adapters": len(ranks),
                "ms": round(timer.replay_ms(graphs[batch]), 4),
                "floor_ms": round(sites.floor_bytes(ranks) / BANDWIDTH * 1e3, 4),
                "in_situ_ms": None,
            }
        )


if __name__ == "__main__":
    main()
