"""What each run of the fleet benchmark serves: rows, adapters, lengths of jobs, and how its load rises and falls.

Pure numbers. Long jobs are among the others, so that a worker that is drained still runs some.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.fleet_load import Lengths


@dataclass(frozen=True)
class Setting:
    """Of the fleet as a whole, unless it is said otherwise. Loads are shares of what one worker alone serves of the
    jobs that arrive.

    rows: of a worker. lengths: of the jobs that arrive; steady: of those that keep workers busy. arriving_share: the
    tokens/s that a worker serves of the former, as a share of what it serves of the latter. warm_s: for which no
    adapter is loaded before what they serve is measured. low: the low load. shared_high: the high load of workers
    that share what they compute with, and so serve little more together. drain_at: the share of the time at which the
    busiest worker is drained by hand, where no job is long enough to be moved otherwise.
    """

    rows: int
    adapters: int
    tenants: int
    lengths: Lengths
    steady: Lengths
    warm_s: float
    arriving_share: float = 1.0
    low: float = 0.45
    shared_high: float = 1.15
    drain_at: float | None = None

    @property
    def tenant_names(self) -> list[str]:
        return [f"tenant-{number}" for number in range(self.tenants)]


SETTINGS = {
    "7b": Setting(
        rows=64,
        adapters=200,
        tenants=4,
        lengths=Lengths(prompt=(16, 96), new=(32, 192), long=(1600, 3600), long_share=0.07),
        steady=Lengths(prompt=(16, 96), new=(64, 192), long=(0, 0), long_share=0.0),
        warm_s=5.0,
        # Most tokens are long jobs', whose steps read long contexts: 4,480 tok/s of 7,960 (H200).
        arriving_share=0.6,
    ),
    # The others are for rehearsals: small, on any machine.
    "tiny": Setting(
        rows=16,
        adapters=100,
        tenants=4,
        lengths=Lengths(prompt=(8, 32), new=(32, 128), long=(1500, 3000), long_share=0.05),
        steady=Lengths(prompt=(8, 32), new=(32, 128), long=(0, 0), long_share=0.0),
        warm_s=4.0,
    ),
    "demo": Setting(
        rows=8,
        adapters=200,
        tenants=4,
        lengths=Lengths(prompt=(4, 16), new=(16, 64), long=(180, 230), long_share=0.3),
        steady=Lengths(prompt=(4, 16), new=(16, 64), long=(0, 0), long_share=0.0),
        warm_s=4.0,
        low=0.6,
        shared_high=2.5,  # two cores are shared with much else: what one worker serves is not the same twice
        drain_at=0.5,
    ),
}

# (share of the time, load as a share of what one worker serves), joined by lines.
Points = list[tuple[float, float]]


def rates(setting: Setting, num_workers: int, *, is_shared: bool) -> Callable[[float], float]:
    """The load at a share of the time, as a share of what one worker serves. One that is alone is left without load
    for a while, and sleeps.
    """
    low, high = setting.low, setting.shared_high if is_shared else 0.8 * num_workers
    if num_workers == 1:
        return lines([(0, low), (0.2, low), (0.3, 0.8), (0.45, 0.8), (0.5, 0), (0.85, 0), (0.86, low), (1, low)])
    return lines([(0, low), (0.2, low), (0.3, high), (0.55, high), (0.6, low), (1, low)])


def lines(points: Points) -> Callable[[float], float]:
    """Straight between the points, and level outside."""

    def at(share: float) -> float:
        before = points[0]
        for point in points:
            if point[0] >= share:
                if point[0] == before[0]:
                    return point[1]
                return before[1] + (point[1] - before[1]) * (share - before[0]) / (point[0] - before[0])
            before = point
        return before[1]

    return at
