"""What the fleet benchmark does with a running service: one worker alone, a load that rises and falls, all workers.

It knows the load and the watch over the fleet, and not how the service was started.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click

from benchmarks import record
from benchmarks.fleet_load import Arrivals, Backlog, Ledger, Lengths, Source, Tenant
from benchmarks.fleet_shapes import Setting, rates
from benchmarks.fleet_watch import Watch
from medley.db.fleet import Steer

SEED = 20261122
WAKE_S = 600.0  # for workers to wake; models are loaded and kernels may have to be built
LOADED_S = 120.0  # for the adapters of a load to be in the workers' memory; where they have no room they never all are
SETTLE_S = 90.0  # after the load has fallen for as long as planned: for the last to be alone awake
LOOK_S = 0.5
REPORT_S = 3.0  # by which workers have told of the steps before
SERIES_S, RATE_S = 1.0, 5.0  # between two points of a series; over which its rates are taken


@dataclass
class Bench:
    """The service as it runs, and what it is made to do."""

    setting: Setting
    num_workers: int
    tenants: list[Tenant]
    watch: Watch
    ledger: Ledger = field(default_factory=Ledger)

    def saturate(self, num_workers: int, window_s: float) -> dict[str, Any]:
        """Tokens/s of so many workers with more to do than they can: of results, and by the engines' own count."""
        setting, watch = self.setting, self.watch
        ledger = Ledger()
        sources = self._sources(setting.steady, seed=SEED + num_workers)
        with Backlog(ledger, sources, self.tenants, 6 * setting.rows * num_workers):
            wait_for("every worker to be awake", WAKE_S, lambda: watch.num_active() == num_workers)
            warm_s = self._warm_up()
            since = watch.now
            time.sleep(window_s)
            until = watch.now
        self._add(ledger)
        counted = sum(seen.tokens(since, until) for seen in watch.workers.values())
        return {
            "workers": num_workers,
            "warm_up_s": round(warm_s, 1),
            "tok_s": round(ledger.tokens_per_s(since, until), 1),
            "engines_tok_s": round(counted / (until - since), 1),
            "rows_per_step": [round(seen.rows_per_step(since, until), 1) for seen in watch.workers.values()],
        }

    def _warm_up(self) -> float:
        """Until no worker that is awake has loaded an adapter for a while; how long that took."""
        started, watch = time.monotonic(), self.watch
        while time.monotonic() - started < LOADED_S:
            time.sleep(LOOK_S)
            since = watch.now - self.setting.warm_s
            has_waited = time.monotonic() - started > self.setting.warm_s
            if has_waited and not any(seen.loaded_since(since) for seen in watch.workers.values()):
                break
        return time.monotonic() - started

    def rise_and_fall(self, capacity_jobs_s: float, seconds: float, is_shared: bool) -> dict[str, Any]:
        """Jobs by the rates of the plan, as shares of what one worker serves of them. What the fleet did meanwhile."""
        rate = rates(self.setting, self.num_workers, is_shared=is_shared)
        sources = self._sources(self.setting.lengths, seed=SEED)
        time.sleep(REPORT_S)
        ledger, since = Ledger(), self.watch.now
        with Arrivals(ledger, sources, self.tenants, lambda s: capacity_jobs_s * rate(s / seconds)):
            self._watch_over(seconds)
            self._settle()
            until = self.watch.now
        self._add(ledger)
        awake = [(round(at - since, 2), num) for at, num in self.watch.awake(since, until)]
        wakes = sorted(self.watch.wakes)
        return {
            "gpus_awake": awake,
            "wake_s": round(wakes[len(wakes) // 2], 3) if wakes else None,
            "wakes_s": [round(wake, 3) for wake in wakes],
            "series": self._series(ledger, since, until),
        }

    def _watch_over(self, seconds: float) -> None:
        """Lets the dispatcher decide, but for a drain by hand."""
        drain_at = self.setting.drain_at if self.num_workers > 1 else None
        if drain_at is not None:
            time.sleep(drain_at * seconds)
            busiest = self.watch.busiest()
            self.watch.steer([busiest], Steer.DRAIN)
            wait_for("the drained worker to sleep", WAKE_S, lambda: self.watch.is_asleep(busiest))
            self.watch.steer([busiest], Steer.RELEASE)
        time.sleep((1 - (drain_at or 0)) * seconds)

    def _settle(self) -> None:
        """The low load goes on until the others sleep again, for so long as that may take."""
        deadline = time.monotonic() + SETTLE_S
        while self.num_workers > 1 and self.watch.num_awake() > 1 and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        time.sleep(RATE_S)

    def _series(self, ledger: Ledger, since: float, until: float) -> list[dict[str, Any]]:
        """load_tok_s: new tokens that were asked for. rows_per_step: of each worker. Rates of the last RATE_S."""
        points = []
        for number in range(1, int((until - since) / SERIES_S) + 1):
            now = since + number * SERIES_S
            before = max(since, now - RATE_S)
            asked = sum(tokens for at, _, tokens in ledger.submitted if before <= at < now)
            seen = self.watch.workers.values()
            points.append(
                {
                    "s": round(now - since, 1),
                    "load_tok_s": round(asked / (now - before), 1),
                    "tok_s": round(sum(w.tokens(before, now) for w in seen) / (now - before), 1),
                    "queued": self.watch.num_queued(now),
                    "rows_per_step": [round(w.rows_per_step(before, now), 1) for w in seen],
                }
            )
        return points

    def _sources(self, lengths: Lengths, seed: int) -> dict[str, Source]:
        return {tenant.name: Source(tenant, lengths, seed) for tenant in self.tenants}

    def _add(self, ledger: Ledger) -> None:
        """To what the whole run has come to; each phase has a ledger of its own."""
        self.ledger.submitted += ledger.submitted
        self.ledger.results += ledger.results
        self.ledger.faults += ledger.faults
        self.ledger.num_failed += ledger.num_failed


def run_phases(
    bench: Bench, figures: dict[str, Any], unshown: list[str], trace_s: float, window_s: float, *, is_shared: bool
) -> None:
    """One worker alone, the rise and fall, all workers: into `figures`. unshown: what should be seen and was not."""
    watch, num = bench.watch, bench.num_workers
    others = list(watch.workers)[1:]
    watch.steer(others, Steer.SLEEP)
    one = bench.saturate(1, window_s)
    record.say(f"one worker: {one}")
    watch.steer(others, Steer.RELEASE)
    arriving_tok_s = bench.setting.arriving_share * one["tok_s"]
    figures |= {"one_gpu_tok_s": one["tok_s"], "one_gpu_arriving_tok_s": round(arriving_tok_s, 1), "steady": [one]}
    figures |= bench.rise_and_fall(arriving_tok_s / bench.setting.lengths.mean_new, trace_s, is_shared)
    counts = [count for _, count in figures["gpus_awake"]]
    record.say(f"awake: {figures['gpus_awake']}, woken in {figures['wakes_s']} s")
    if num == 1:
        return
    if (counts[0], max(counts), counts[-1]) != (1, num, 1):
        unshown.append(f"workers awake: {counts}")
    every = bench.saturate(num, window_s)
    record.say(f"all workers: {every}")
    word = {2: "two"}.get(num, str(num))
    figures |= {f"{word}_gpu_tok_s": every["tok_s"], "ratio": round(every["tok_s"] / one["tok_s"], 3)}
    figures["steady"].append(every)


def wait_for(what: str, timeout_s: float, holds: Callable[[], bool]) -> None:
    """Raises ClickException where it does not hold within that time."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise click.ClickException(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.1)
