"""What a simulation says: GPU-seconds beside the oracle's, waits, fairness, loads, wakes; as one JSON-ready struct."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from medley.dispatcher.simulation.oracle import oracle
from medley.dispatcher.simulation.run import Course, Simulation
from medley.dispatcher.simulation.traces import Trace
from medley.dispatcher.simulation.workers import Shape

PERCENTILES = (50, 95, 99, 100)


class Waits(msgspec.Struct, frozen=True):
    """Seconds from a job's arrival until it has a row and its adapter."""

    p50_s: float
    p95_s: float
    p99_s: float
    max_s: float


class Fairness(msgspec.Struct, frozen=True):
    """Largest over smallest service (tokens over weight) of tenants that waited throughout: windows of 30 s, and all.

    overall: of those that waited in every window in which two or more did.
    """

    windows: int
    overall: float | None
    median: float | None
    worst: float | None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    trace: str
    jobs: int
    duration_s: float
    workers: int
    max_num_seqs: int
    gpu_seconds: float
    oracle_gpu_seconds: float
    ratio: float
    mean_awake: float
    max_awake: int
    oracle_max: int
    rows_per_awake: float
    wait: Waits
    wait_by_size: dict[str, Waits]
    fairness: Fairness
    adapters: int
    adapter_loads: int
    max_loads_of_an_adapter: int
    wakes: int
    wakes_with_room: int
    drains: int
    migrations: int
    plans: int


class Series(msgspec.Struct, frozen=True):
    """By second, for plots."""

    awake: list[int]
    oracle: list[int]
    rows: list[int]
    queued: list[int]


def simulate(trace: Trace, shape: Shape, num_workers: int, **options: Any) -> tuple[Report, Series]:
    """Runs `trace` on `num_workers` virtual workers and on the oracle. `options`: of `Simulation`."""
    ideal = oracle(trace, shape)
    course = Simulation(trace, shape, num_workers, **options).run()
    report = _report(trace, shape, num_workers, course, ideal)
    return report, Series(course.awake, ideal.tolist(), course.rows, course.queued)


def _report(trace: Trace, shape: Shape, num_workers: int, course: Course, ideal: NDArray[np.int64]) -> Report:
    waits = np.array([job.started_s - job.arrived_s for job in course.jobs])
    oracle_s = float(ideal.sum())
    awake_s = sum(course.awake)
    return Report(
        trace=trace.name,
        jobs=len(trace),
        duration_s=round(course.end_s, 1),
        workers=num_workers,
        max_num_seqs=shape.max_num_seqs,
        gpu_seconds=round(course.gpu_seconds, 1),
        oracle_gpu_seconds=oracle_s,
        ratio=round(course.gpu_seconds / oracle_s, 4) if oracle_s else 0.0,
        mean_awake=round(awake_s / len(course.awake), 2),
        max_awake=max(course.awake),
        oracle_max=int(ideal.max()),
        rows_per_awake=round(sum(course.rows) / awake_s, 1) if awake_s else 0.0,
        wait=_waits(waits),
        wait_by_size=_by_size(trace, waits),
        fairness=_fairness(course),
        adapters=len(np.unique(trace.adapter[trace.adapter >= 0])),
        adapter_loads=course.num_loads,
        max_loads_of_an_adapter=max(course.loads.values(), default=0),
        wakes=course.num_wakes,
        wakes_with_room=course.num_wakes_with_room,
        drains=course.num_drains,
        migrations=course.num_migrations,
        plans=course.num_plans,
    )


def _waits(waits: NDArray[np.float64]) -> Waits:
    return Waits(*(round(float(value), 3) for value in np.percentile(waits, PERCENTILES)))


def _by_size(trace: Trace, waits: NDArray[np.float64]) -> dict[str, Waits]:
    """Waits of light tenants and of heavy ones: those with more than half of all jobs."""
    tenants, counts = np.unique(trace.tenant, return_counts=True)
    heavy = np.isin(trace.tenant, tenants[counts > len(trace) / 2])
    found = {"light": ~heavy, "heavy": heavy}
    return {name: _waits(waits[which]) for name, which in found.items() if which.any()}


def _fairness(course: Course) -> Fairness:
    windows = course.shares
    if not windows:
        return Fairness(0, None, None, None)
    ratios = [_spread(shares.values()) for shares in windows]
    throughout = set.intersection(*(set(shares) for shares in windows))
    overall = _spread([sum(shares[t] for shares in windows) for t in throughout]) if len(throughout) > 1 else None
    return Fairness(len(ratios), overall, round(float(np.median(ratios)), 3), max(ratios))


def _spread(shares: Iterable[float]) -> float:
    """Largest over smallest; who got nothing is taken to have got one token."""
    found = [max(1.0, share) for share in shares]
    return round(max(found) / min(found), 3)


def as_text(report: Report) -> Sequence[str]:
    """The report for a terminal, a line each."""
    wait, fair = report.wait, report.fairness
    lines = [
        f"{report.trace}: {report.jobs:,} jobs in {report.duration_s:,.0f} s on up to {report.workers:,} workers"
        f" of {report.max_num_seqs} rows",
        f"GPU-seconds  {report.gpu_seconds:,.0f}, oracle {report.oracle_gpu_seconds:,.0f}: {report.ratio:.3f} times",
        f"awake        mean {report.mean_awake}, most {report.max_awake} (oracle {report.oracle_max});"
        f" {report.rows_per_awake} rows each",
        f"wait         p50 {wait.p50_s:.2f} s, p95 {wait.p95_s:.2f} s, p99 {wait.p99_s:.2f} s, most {wait.max_s:.2f} s",
    ]
    if len(report.wait_by_size) > 1:
        light = report.wait_by_size["light"]
        lines.append(f"  light      p50 {light.p50_s:.2f} s, p95 {light.p95_s:.2f} s, p99 {light.p99_s:.2f} s")
    if fair.median is not None:
        shares = f"median {fair.median:.2f}, worst {fair.worst:.2f}; overall {fair.overall or 1.0:.2f}"
        lines.append(f"fairness     largest over smallest share in 30 s: {shares}")
    return [
        *lines,
        f"adapters     {report.adapters:,}, loaded {report.adapter_loads:,} times (one at most"
        f" {report.max_loads_of_an_adapter})",
        f"fleet        {report.wakes} wakes ({report.wakes_with_room} with room elsewhere), {report.drains} drains,"
        f" {report.migrations} jobs moved",
    ]
