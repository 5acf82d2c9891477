"""The policy on its traces: `medley simulate` with the seeds and sizes of the figures.

Writes `results/simulate-<trace>.json` and, where matplotlib is installed, a picture beside it. A simulation depends on
its seed alone, so the machine shows in nothing but `took_s`.
"""

from __future__ import annotations

import importlib.util
import json
import time
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from benchmarks.record import RESULTS, say
from medley.dispatcher.plans import Rules
from medley.dispatcher.simulation.report import simulate
from medley.dispatcher.simulation.traces import TRACES, Mix
from medley.dispatcher.simulation.workers import Shape
from medley.dispatcher.step_time import H200_7B

# name: (trace, seconds, jobs/s at the peak, virtual workers, least time between plans, seeds)
RUNS: dict[str, tuple[str, float, float, int, float, tuple[int, ...]]] = {
    "day": ("day", 7_200.0, 150.0, 64, 0.25, (1, 2, 3)),
    "ramp": ("ramp", 1_800.0, 200.0, 64, 0.1, (1, 2, 3)),
    "bursts": ("bursts", 1_200.0, 100.0, 64, 0.1, (1,)),
    "bulk": ("bulk", 600.0, 60.0, 16, 0.1, (1, 2, 3)),
    "contention": ("contention", 900.0, 60.0, 8, 0.1, (1, 2, 3)),
    "thousands": ("ramp", 60.0, 12_000.0, 2_000, 0.25, (1,)),
}


@click.command()
@click.argument("names", nargs=-1)
def main(names: tuple[str, ...]) -> None:
    """Run NAMES (all of them), and write what came out."""
    for name in names or tuple(RUNS):
        kind, duration_s, peak, num_workers, turn_s, seeds = RUNS[name]
        mix = Mix(num_adapters=1_000, num_tenants=100) if name == "thousands" else Mix()
        shape = Shape(step_time=H200_7B)
        rows: list[dict[str, Any]] = []
        for seed in seeds:
            began = time.perf_counter()
            trace = TRACES[kind](seed, duration_s, peak, mix)
            report, series = simulate(trace, shape, num_workers, turn_s=turn_s)
            took_s = round(time.perf_counter() - began, 1)
            rows.append({"seed": seed, "took_s": took_s, **msgspec.to_builtins(report)})
            if seed == seeds[0] and importlib.util.find_spec("matplotlib"):
                from medley.dispatcher.simulation.plots import draw

                draw(report, series, RESULTS / f"simulate-{name}.png")
            say(f"{name}, seed {seed}: {report.ratio:.3f} times the oracle, p95 {report.wait.p95_s} s, took {took_s} s")
        document = {
            "what": f"simulate-{name}",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "command": f"python -m benchmarks.simulate {name}",
            "notes": [
                "virtual workers at the step time of Llama-2-7B on one H200; `medley simulate` says what is left out"
            ],
            "trace": {"kind": kind, "duration_s": duration_s, "peak_jobs_s": peak, "turn_s": turn_s},
            "mix": msgspec.to_builtins(mix),
            "shape": msgspec.to_builtins(shape),
            "rules": msgspec.to_builtins(Rules()),
            "rows": rows,
        }
        (RESULTS / f"simulate-{name}.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
