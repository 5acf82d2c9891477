"""What the leader has seen of workers and lanes that no row says: rates, idleness, waits, sizes of jobs.

It is a memory of observations, not of decisions: a new leader begins with none and sees all of it again within
seconds. It knows no rows and reads no clock; times are handed in, in seconds of a monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from uuid import UUID

RATE_WINDOW_S = 1.0  # a rate follows a change within about this time
FIRST_GUESS_TOKENS = 256.0  # of a job, before any was seen


@dataclass
class _Track:
    """One worker. What it finished is what it was given less what it holds."""

    seen_at: float
    num_leased: int
    num_claimed: int = 0  # since seen_at
    num_finished: int = 0  # since it was first seen
    jobs_per_s: float | None = None
    empty_since: float | None = None


class Sightings:
    def __init__(self) -> None:
        self._tracks: dict[UUID, _Track] = {}
        self._served_at: dict[UUID, float] = {}
        self._job_tokens: dict[UUID, float] = {}
        self._mean_tokens = FIRST_GUESS_TOKENS
        self._num_active = 0
        self._steady_since = self._load_at = -math.inf
        self._load = 0.0
        self._waited_at: dict[UUID, float] = {}

    def see_workers(self, num_leased: Mapping[UUID, int], now: float) -> set[UUID]:
        """Takes note of what each living worker holds now. Returns those that are gone."""
        gone = self._tracks.keys() - num_leased.keys()
        for worker in gone:
            del self._tracks[worker]
        for worker, num in num_leased.items():
            track = self._tracks.get(worker)
            if track is None:
                track = self._tracks[worker] = _Track(now, num)
            # A short job may come and go between two looks.
            has_worked = track.num_claimed > 0
            elapsed_s = now - track.seen_at
            if elapsed_s > 0:
                num_finished = max(0, track.num_leased + track.num_claimed - num)
                rate = num_finished / elapsed_s
                track.num_finished += num_finished
                weight = min(1.0, elapsed_s / RATE_WINDOW_S) if track.jobs_per_s is not None else 1.0
                track.jobs_per_s = (track.jobs_per_s or 0.0) * (1 - weight) + rate * weight
                track.seen_at, track.num_leased, track.num_claimed = now, num, 0
            if num:
                track.empty_since = None
            elif has_worked or track.empty_since is None:
                track.empty_since = now
        return gone

    def see_lanes(self, lanes: Iterable[UUID], now: float) -> None:
        """Takes note of the lanes in which jobs wait now."""
        present = set(lanes)
        for lane in present - self._served_at.keys():
            self._served_at[lane] = now
        for lane in self._served_at.keys() - present:
            del self._served_at[lane]
            self._job_tokens.pop(lane, None)

    def see_tenants(self, waiting: Iterable[UUID], backlogged: Iterable[UUID], now: float) -> None:
        """Takes note of the tenants whose jobs wait now; of `backlogged` ones, from when on they are watched."""
        for tenant in waiting:
            self._waited_at[tenant] = now
        for tenant in backlogged:
            self._waited_at.setdefault(tenant, now)

    def see_claim(self, worker: UUID, lane: UUID, num_jobs: int, est_tokens: float, now: float) -> None:
        """Takes note of jobs of one lane that a worker was given; est_tokens: of all of them."""
        mean = est_tokens / num_jobs
        if lane in self._served_at:
            self._served_at[lane] = now
            self._job_tokens[lane] = mean
        self._mean_tokens += (mean - self._mean_tokens) / 8
        self._tracks[worker].num_claimed += num_jobs

    def see_load(self, num_active: int, num_leased: int, now: float, within_s: float) -> None:
        """Takes note of how many workers are active and what all workers hold; a mean over about `within_s`."""
        if num_active != self._num_active:
            self._num_active, self._steady_since = num_active, now
        weight = 1.0 - math.exp(-(now - self._load_at) / within_s)
        self._load += weight * (num_leased - self._load)
        self._load_at = now

    def usual_leased(self, now: float, within_s: float) -> float | None:
        """What workers held on the average; None until as many were active for `within_s`."""
        return self._load if now - self._steady_since >= within_s else None

    def jobs_per_s(self, worker: UUID) -> float:
        """0 for a worker that was never seen."""
        track = self._tracks.get(worker)
        return 0.0 if track is None else track.jobs_per_s or 0.0

    def num_finished(self, worker: UUID) -> int:
        """Jobs that have left the worker since it was first seen."""
        return self._tracks[worker].num_finished

    def idle_s(self, worker: UUID, now: float) -> float:
        """For how long the worker has held no job."""
        since = self._tracks[worker].empty_since
        return 0.0 if since is None else now - since

    def waited_s(self, lane: UUID, now: float) -> float:
        """Since the lane was served, or first seen."""
        return now - self._served_at.get(lane, now)

    def satisfied_s(self, tenant: UUID, now: float) -> float:
        """For how long none of the tenant's jobs has waited."""
        return now - self._waited_at.get(tenant, now)

    def job_tokens(self, lane: UUID) -> float:
        """What a job of the lane was last charged; for a new lane, what jobs are charged on the whole."""
        return self._job_tokens.get(lane, self._mean_tokens)
