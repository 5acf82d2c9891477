"""Draws `h200-lora-path.png`: the LoRA path of a decode step over the number of adapters in it, beside vLLM and floor.

Reads `<gpu>-lora-path.json` and measures nothing. Wants the extra `plot`. A line joins the best of each number of
adapters; dots are all batches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu.peers import VLLM
from benchmarks.record import RESULTS, say

RANK = 16
OURS, PEER, FLOOR = "#1565c0", "#c62828", "#757575"

Point = tuple[int, float]


def points(rows: list[dict[str, Any]], field: str, rank: int = RANK) -> list[Point]:
    """(adapters, ms) of our rows of a rank, by the number of adapters."""
    return sorted((row["adapters"], row[field]) for row in rows if row["rank"] == rank)


def best(of: list[Point]) -> list[Point]:
    """The lowest point of each number of adapters."""
    lowest: dict[int, float] = {}
    for adapters, ms in of:
        lowest[adapters] = min(ms, lowest.get(adapters, ms))
    return sorted(lowest.items())


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(7, 4.5), layout="constrained")
    axes = canvas.subplots()
    ours = points(rows, "ms")
    peer = sorted((row.adapters, row.ms) for row in VLLM if row.rank == RANK)
    for name, series, colour, marker in (("vLLM 0.24", peer, PEER, "s"), ("Medley", ours, OURS, "o")):
        axes.scatter(*zip(*series, strict=True), s=18, color=colour, marker=marker, alpha=0.7)
        axes.plot(*zip(*best(series), strict=True), color=colour, label=name)
    axes.plot(
        *zip(*best(points(rows, "floor_ms")), strict=True), color=FLOOR, linestyle="--", label="weights read once"
    )
    axes.set(xscale="log", yscale="log", xlabel="adapters in the step", ylabel="ms a decode step", title=title)
    ticks = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    canvas.savefig(path, dpi=150)


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=RESULTS, help="Where results lie.")
@click.option("--gpu", default="h200", show_default=True)
def main(folder: Path, gpu: str) -> None:
    """Draw the figures of <gpu>-lora-path.json."""
    document = json.loads((folder / f"{gpu}-lora-path.json").read_text())
    path = folder / f"{gpu}-lora-path.png"
    draw(document["rows"], f"LoRA path of a 7B decode step, rank {RANK}, {document['machine']['gpu']}", path)
    say(f"wrote {path}")


if __name__ == "__main__":
    main()
