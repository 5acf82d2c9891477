"""A simulation as a picture: workers awake beside the oracle's, and what runs and waits. Wants the extra `plot`."""

from __future__ import annotations

from pathlib import Path

from medley.dispatcher.simulation.report import Report, Series

OURS, ORACLE, QUEUE = "#1565c0", "#757575", "#c62828"


def draw(report: Report, series: Series, path: Path) -> None:
    """Writes the picture; the ending of `path` says in which format."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(8, 5), layout="constrained")
    fleet, load = canvas.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    fleet.step(range(len(series.oracle)), series.oracle, where="post", color=ORACLE, linewidth=0.8, label="oracle")
    fleet.step(range(len(series.awake)), series.awake, where="post", color=OURS, label="awake")
    fleet.set(
        ylabel="workers",
        title=f"{report.trace}: {report.ratio:.3f} times the oracle's GPU-seconds, p95 wait {report.wait.p95_s:.2f} s",
    )
    load.plot(series.rows, color=OURS, linewidth=0.8, label="rows taken")
    load.plot(series.queued, color=QUEUE, linewidth=0.8, label="jobs queued")
    load.set(xlabel="seconds", ylabel="jobs")
    for axes in (fleet, load):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper right")
    canvas.savefig(path, dpi=130)
