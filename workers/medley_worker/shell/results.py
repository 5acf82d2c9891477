"""Results on their way to PostgreSQL: one thread, one transaction a flush, nothing lost while PostgreSQL is away.

Owns the transitions of held jobs out of this worker: `complete` and `release`, both fenced by (job, attempt,
worker) and the lease. What is fenced is dropped: another worker has the job by then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from uuid import UUID

import msgspec
import sqlalchemy.exc
import structlog
from sqlalchemy import Connection

from medley.db import ends, queue
from medley.db.ends import Result
from medley.db.queue import Release
from medley.rings import Ringer, pool_channel
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState
from medley.spec.wire import JobKey
from medley_worker.shell.held import HeldJobs
from medley_worker.shell.transactions import Transactions

MAX_FLUSH = 1_024  # results of one transaction
MAX_FLUSH_DETAILS = 1_000_000  # log-probabilities of alternatives in one transaction: some 20 MB
FULL_FLUSH = 512  # with this many there is no point in waiting for more
LINGER_S = 0.02  # how long the first result of a flush waits for company,
BUSY_LINGER_S = 0.1  # and where so many are held that company is sure to come: a flush has a cost of its own

# Faults of the data. Any other (a schema or a right that is missing) is no result's: it ends the process, and the
# jobs go to another worker.
_REFUSALS = (sqlalchemy.exc.DataError, sqlalchemy.exc.IntegrityError, ValueError)

log = structlog.get_logger()


class Results:
    """Takes results and releases from any thread; `run` stores them.

    on_fenced: called after a write was fenced, which is how a lost lease shows first.
    """

    def __init__(
        self,
        transactions: Transactions,
        worker: UUID,
        held: HeldJobs,
        ringer: Ringer,
        *,
        pool: str,
        low_water: int,
        on_fenced: Callable[[], None],
    ) -> None:
        """low_water: with fewer held jobs than this the dispatcher is told that there is room."""
        self._transactions = transactions
        self._worker = worker
        self._held = held
        self._ringer = ringer
        self._pool_channel = pool_channel(pool)
        self._low_water = low_water
        self._on_fenced = on_fenced
        self._changed = threading.Condition()
        self._results: list[Result] = []
        self._releases: list[Release] = []

    def put(self, results: Sequence[Result]) -> None:
        """Ends of jobs; each is ENDING in the table and stays there until it is stored."""
        if results:
            with self._changed:
                self._results += results
                self._changed.notify()

    def put_back(self, releases: Sequence[Release]) -> None:
        """Jobs to give back; each is ENDING in the table likewise."""
        if releases:
            with self._changed:
                self._releases += releases
                self._changed.notify()

    def give_back_waiting(self) -> None:
        """Release what waits outside the engine."""
        self.give_back([held.key for held in self._held.end_waiting()])

    def give_back(self, keys: Sequence[JobKey]) -> None:
        """Give jobs back without a checkpoint: one that a job came with stays as it is."""
        self.put_back([Release(job=key.job, attempt=key.attempt, checkpoint=None) for key in keys])

    def run(self) -> None:
        """Flush for ever, on a thread of its own."""
        while True:
            results, releases = self._gather()
            if results:
                self._store(results)
            if releases:
                self._release(releases)
            if len(self._held) < self._low_water:
                self._ringer.ring(self._pool_channel)

    def _gather(self) -> tuple[list[Result], list[Release]]:
        with self._changed:
            while not (self._results or self._releases):
                self._changed.wait()
            linger_s = LINGER_S if len(self._held) < FULL_FLUSH else BUSY_LINGER_S
            self._changed.wait_for(lambda: len(self._results) >= FULL_FLUSH, linger_s)
            results = _first_part(self._results)
            del self._results[: len(results)]
            releases, self._releases = self._releases, []
            return results, releases

    def _store(self, results: list[Result]) -> None:
        def complete(conn: Connection) -> list[ends.Ended]:
            return ends.complete(conn, self._worker, results)

        try:
            ended = self._transactions.insist("storing results", complete)
        except _REFUSALS as error:
            self._store_apart(results, error)
            return
        self._held.drop(JobKey(result.job, result.attempt) for result in results)
        for batch in {end.batch for end in ended}:
            self._ringer.ring_done(batch)
        if len(ended) < len(results):
            self._fenced("results.fenced", {r.job for r in results} - {end.job for end in ended})

    def _store_apart(self, results: list[Result], error: Exception) -> None:
        """PostgreSQL refuses something among `results`: halve until it is found, and fail that job alone."""
        if len(results) > 1:
            middle = len(results) // 2
            self._store(results[:middle])
            self._store(results[middle:])
            return
        (result,) = results
        cause = type(getattr(error, "orig", error)).__name__
        log.error("result.refused", job=result.job.hex, attempt=result.attempt, error=cause)
        failure = JobError(code=ErrorCode.ENGINE, message=f"the result could not be stored: {cause}")
        if result.error == failure:
            raise error  # a job that cannot be ended must not be held for ever
        self._store([Result(job=result.job, attempt=result.attempt, state=JobState.FAILED, error=failure)])

    def _release(self, releases: list[Release]) -> None:
        def release(conn: Connection) -> list[UUID]:
            return queue.release(conn, self._worker, releases)

        back = self._transactions.insist("releasing jobs", release)
        self._held.drop(JobKey(release.job, release.attempt) for release in releases)
        self._ringer.ring(self._pool_channel)
        if len(back) < len(releases):
            self._fenced("releases.fenced", {r.job for r in releases} - set(back))

    def _fenced(self, event: str, jobs: set[UUID]) -> None:
        log.warning(event, worker=self._worker.hex, num_jobs=len(jobs), jobs=[job.hex for job in sorted(jobs)[:3]])
        self._on_fenced()


def _first_part(results: Sequence[Result]) -> list[Result]:
    """As many as one transaction takes, at least one."""
    part: list[Result] = []
    num_details = 0
    for result in results[:MAX_FLUSH]:
        if result.details is not msgspec.UNSET:
            num_details += len(result.details.top_logprobs) + len(result.details.prompt_top_logprobs)
            if num_details > MAX_FLUSH_DETAILS and part:
                break
        part.append(result)
    return part
