"""`kernels.json`: microseconds of one LoRA site for each variant of SGMV, 7B shape.

us: all 32 layers' launches of one projection group in one CUDA graph, over 32. floor_us: the group's weight bytes of
each adapter, read once.
"""

from __future__ import annotations

import itertools
import tempfile
from functools import partial
from pathlib import Path

import click

from benchmarks.gpu.floors import BANDWIDTH
from benchmarks.gpu.lora_sites import LoraSites, MakeLora, TilesShort
from benchmarks.gpu.results import Figure, Run, part_options
from benchmarks.gpu.shapes import base_model
from benchmarks.gpu.timing import GraphTimer
from benchmarks.gpu.workloads import adapter_counts, adapter_rows
from benchmarks.record import say
from medley_worker.ops.kernels import MODES
from medley_worker.ops.lora_stage import GroupShape
from medley_worker.ops.sgmv import SgmvLora

VARIANTS: dict[str, MakeLora] = {mode: partial(SgmvLora, mode=mode) for mode in MODES}
VARIANTS |= {f"{mode}, no early launch": partial(SgmvLora, mode=mode, pdl=False) for mode in MODES}
RANKS = (16, 64)
BATCHES = (1, 32, 64, 128)
POPULARITIES = ("identical", "uniform", "distinct")
ROW_S = 2.0
MAX_ADAPTER_RANKS = 64 * 64


def group_floor_us(group: GroupShape, num_adapters: int, rank: int) -> float:
    """A and B of one layer of a group, bf16, of each adapter."""
    per_rank = group.num_sites * group.in_features + sum(group.out_features)
    return num_adapters * per_rank * rank * 2 / BANDWIDTH * 1e6


@click.command()
@part_options
def main(run: Run) -> None:
    """Measure each site alone."""
    figure = Figure("kernels", ("variant", "group", "rank", "batch", "popularity"), run)
    with tempfile.TemporaryDirectory() as folder:
        model = base_model("7b", Path(folder))
    num_tiles = MAX_ADAPTER_RANKS // 8 * 4
    sites = LoraSites(model, num_tiles=num_tiles, max_tokens=max(BATCHES), max_adapters=max(BATCHES))
    timer = GraphTimer()
    for variant, make in VARIANTS.items():
        sites.use(make)
        for rank, batch, popularity in itertools.product(RANKS, BATCHES, POPULARITIES):
            ranks = [rank] * len(adapter_counts(batch, popularity))
            groups = [
                group
                for group in sites.layout.groups
                if figure.wants(variant=variant, group=group.name, rank=rank, batch=batch, popularity=popularity)
            ]
            if not groups or sum(ranks) > MAX_ADAPTER_RANKS:
                continue
            if not run.has_time_for(ROW_S):
                return
            try:
                work = sites.upload(ranks, sorted(adapter_rows(batch, popularity)))
            except TilesShort as short:
                say(f"left out: rank {rank}, batch {batch}, {popularity}: {short}")
                continue
            for group in groups:
                graph = timer.capture(partial(sites.step, batch, work, (group.name,)))
                figure.add(
                    {
                        "variant": variant,
                        "group": group.name,
                        "rank": rank,
                        "batch": batch,
                        "popularity": popularity,
                        "adapters": len(ranks),
                        "us": round(timer.replay_ms(graph) * 1e3 / model.num_layers, 2),
                        "floor_us": round(group_floor_us(group, len(ranks), rank), 2),
                    }
                )


if __name__ == "__main__":
    main()
