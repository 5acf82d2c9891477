"""Draws `<machine>-fleet.png` beside a `<machine>-fleet.json`: load, workers awake and rows a step over time.

Measures nothing. Wants the extra `plot`: `python -m benchmarks.fleet_plot FILE.json`.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import click

LOAD, SERVED, AWAKE = "#c62828", "#1565c0", "#2e7d32"


def draw(path: Path) -> bool:
    """Write the picture beside the file; False where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure as Canvas

    document = json.loads(path.read_text())
    series = document["series"]
    times = [point["s"] for point in series]
    canvas = Canvas(figsize=(8, 7), layout="constrained")
    load, awake, rows = canvas.subplots(3, 1, sharex=True, height_ratios=(3, 1.2, 2))
    load.plot(times, [point["load_tok_s"] for point in series], color=LOAD, label="asked for")
    load.plot(times, [point["tok_s"] for point in series], color=SERVED, label="generated")
    at_most = document["one_gpu_arriving_tok_s"]
    load.axhline(at_most, color="#757575", linestyle="--", label="one worker at its most, of such jobs")
    load.set(ylabel="tokens/s", ylim=(0, None), title=_title(document))
    load.legend(loc="upper right")
    steps = [*document["gpus_awake"], (times[-1], document["gpus_awake"][-1][1])]
    awake.step(*zip(*steps, strict=True), where="post", color=AWAKE)
    awake.set(ylabel="GPUs awake", ylim=(0, None))
    awake.yaxis.get_major_locator().set_params(integer=True)
    of_workers = zip(*(point["rows_per_step"] for point in series), strict=True)
    for number, values in enumerate(of_workers):
        rows.plot(times, values, label=f"worker {number}")
    rows.set(ylabel="rows a step", xlabel="seconds", ylim=(0, None))
    rows.legend(loc="upper right")
    for axes in (load, awake, rows):
        axes.grid(alpha=0.3)
    canvas.savefig(path.with_suffix(".png"), dpi=130)
    return True


def _title(document: dict[str, object]) -> str:
    machine = document["machine"]
    assert isinstance(machine, dict)
    where = f"{machine.get('gpus', '')} {machine.get('gpu', machine['processor'])}".strip()
    moved = f"{document['migrated']} jobs moved, {document['failed']} failed"
    return f"{document['shape']}, {document['adapters']} adapters of {document['tenants']} tenants, {where}: {moved}"


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
def main(path: Path) -> None:
    """Draw the picture of a fleet's result."""
    if not draw(path):
        raise click.ClickException("matplotlib is not installed: pip install 'medley[plot]'")


if __name__ == "__main__":
    main()
