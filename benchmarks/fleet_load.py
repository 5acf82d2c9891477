"""The load of the fleet benchmark: jobs of several tenants over their adapters, submitted and read through the client.

Arrivals come at a rate that rises and falls (`Arrivals`), or as fast as they are served (`Backlog`). A `Ledger` notes
what was submitted and reads every result as its owner would: each job is to succeed once, with all of its tokens.
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from medley.client import Batch, Client

TICK_S = 0.5  # between two batches of a tenant
RESULT_S = 300.0  # the longest that a batch may take


@dataclass(frozen=True)
class Tenant:
    name: str
    client: Client
    adapters: tuple[str, ...]


@dataclass(frozen=True)
class Lengths:
    """Of jobs, in tokens, each drawn evenly between two bounds. long_share: of the jobs, that are long ones."""

    prompt: tuple[int, int]
    new: tuple[int, int]
    long: tuple[int, int]
    long_share: float

    @property
    def mean_new(self) -> float:
        """New tokens of a job on the average."""
        return (sum(self.new) * (1 - self.long_share) + sum(self.long) * self.long_share) / 2


Jobs = list[dict[str, object]]
Submitted = tuple[Batch, dict[str, object]]  # the tokens that are asked for, by job


class Source:
    """Jobs of one tenant, as a function of a seed."""

    def __init__(self, tenant: Tenant, lengths: Lengths, seed: int) -> None:
        self._tenant, self._lengths = tenant, lengths
        self._random = random.Random(f"{tenant.name}/{seed}")
        self._number = 0

    def jobs(self, num_jobs: int) -> Jobs:
        return [self._job() for _ in range(num_jobs)]

    def num_arrived(self, expected: float) -> int:
        """A draw of how many jobs arrive where `expected` are, each by itself."""
        count, left = 0, expected
        while (left := left - self._random.expovariate(1.0)) > 0:
            count += 1
        return count

    def _job(self) -> dict[str, object]:
        self._number += 1
        is_long = self._random.random() < self._lengths.long_share
        return {
            "prompt": "".join(self._random.choices("abcdefgh", k=self._random.randint(*self._lengths.prompt))),
            "adapter": self._random.choice(self._tenant.adapters),
            "max_tokens": self._random.randint(*(self._lengths.long if is_long else self._lengths.new)),
            "ignore_eos": True,
            "seed": self._number,
        }


@dataclass
class Ledger:
    """What was submitted and what came of it. Its lists are appended to by several threads."""

    submitted: list[tuple[float, int, int]] = field(default_factory=list)  # (POSIX time, jobs, new tokens)
    results: list[tuple[float, int]] = field(default_factory=list)  # (POSIX time of its end, tokens), one a job
    faults: list[str] = field(default_factory=list)
    num_failed: int = 0

    @property
    def num_submitted(self) -> int:
        return sum(jobs for _, jobs, _ in self.submitted)

    def tokens_per_s(self, since: float, until: float) -> float:
        """Of the results that came in [since, until), POSIX times on the database's clock."""
        return sum(tokens for at, tokens in self.results if since <= at < until) / (until - since)

    def submit(self, tenant: Tenant, jobs: Jobs) -> Submitted:
        batch = tenant.client.submit_many(jobs)
        asked = dict(zip(batch.job_ids or (), (job["max_tokens"] for job in jobs), strict=True))
        self.submitted.append((time.time(), len(jobs), sum(int(str(job["max_tokens"])) for job in jobs)))
        return batch, asked

    def read(self, batch: Batch, asked: dict[str, object]) -> None:
        """Reads the batch's results to the end, and notes what is not as it should be."""
        left = dict(asked)
        for result in batch.results(timeout=RESULT_S):
            if result.state != "succeeded":
                self.num_failed += 1
                self.faults.append(f"{result.id} is {result.state}: {result.error}")
            elif left.pop(result.id, None) != result.usage.completion_tokens:
                self.faults.append(f"{result.id} came twice, or not with all of its tokens")
            else:
                assert result.finished_at is not None
                self.results.append((result.finished_at.timestamp(), result.usage.completion_tokens))
        counts = batch.refresh().counts
        if left or counts.succeeded != len(asked):
            self.faults.append(f"{batch.id}: {len(left)} jobs of {len(asked)} without a result, counts {counts}")


class Load:
    """Threads that submit, and threads that read what comes of it, one each a tenant, from `__enter__` to `__exit__`.

    On the way out it waits for every result, unless an exception is on its way too.
    """

    def __init__(self, ledger: Ledger, sources: dict[str, Source], tenants: list[Tenant]) -> None:
        self.ledger, self._sources, self._tenants = ledger, sources, tenants
        self._ends = threading.Event()
        self._unread: dict[str, queue.Queue[Submitted | None]] = {t.name: queue.Queue() for t in tenants}
        self._submitters = [threading.Thread(target=self._submit_for, args=(t,), daemon=True) for t in tenants]
        self._readers = [threading.Thread(target=self._read_for, args=(t,), daemon=True) for t in tenants]

    def __enter__(self) -> Self:
        for thread in (*self._submitters, *self._readers):
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ends.set()
        if exc_info[0] is None:
            for thread in (*self._submitters, *self._readers):
                thread.join()

    def _submit_for(self, tenant: Tenant) -> None:
        try:
            self._run(tenant, self._sources[tenant.name], self._unread[tenant.name])
        except Exception as error:
            self.ledger.faults.append(f"{tenant.name} could not submit: {error!r}")
        finally:
            self._unread[tenant.name].put(None)

    def _read_for(self, tenant: Tenant) -> None:
        while (one := self._unread[tenant.name].get()) is not None:
            try:
                self.ledger.read(*one)
            except Exception as error:
                self.ledger.faults.append(f"{tenant.name} could not read its results: {error!r}")

    def _run(self, tenant: Tenant, source: Source, unread: queue.Queue[Submitted | None]) -> None:
        """Submits for a tenant until the end."""
        raise NotImplementedError


class Arrivals(Load):
    """Jobs that arrive by themselves. rate(s): jobs/s of all tenants together, so many seconds after the start."""

    def __init__(
        self, ledger: Ledger, sources: dict[str, Source], tenants: list[Tenant], rate: Callable[[float], float]
    ) -> None:
        super().__init__(ledger, sources, tenants)
        self._rate = rate
        self._started = time.monotonic()

    def _run(self, tenant: Tenant, source: Source, unread: queue.Queue[Submitted | None]) -> None:
        before = 0.0
        while not self._ends.wait(TICK_S):
            now = time.monotonic() - self._started
            jobs = source.jobs(source.num_arrived(self._rate(now) * (now - before) / len(self._tenants)))
            before = now
            if jobs:
                unread.put(self.ledger.submit(tenant, jobs))


class Backlog(Load):
    """As many jobs as are served: each tenant has three batches of so many jobs, and another for each that ends."""

    IN_FLIGHT = 3

    def __init__(self, ledger: Ledger, sources: dict[str, Source], tenants: list[Tenant], num_waiting: int) -> None:
        """num_waiting: jobs of all tenants that wait or run at any time, about."""
        super().__init__(ledger, sources, tenants)
        self._size = max(1, num_waiting // (self.IN_FLIGHT * len(tenants)))

    def _run(self, tenant: Tenant, source: Source, unread: queue.Queue[Submitted | None]) -> None:
        open_: list[Batch] = []
        while not self._ends.is_set():
            while len(open_) < self.IN_FLIGHT:
                one = self.ledger.submit(tenant, source.jobs(self._size))
                open_.append(one[0])
                unread.put(one)
            self._ends.wait(0.1)
            open_ = [batch for batch in open_ if batch.refresh().counts.queued_or_running]
