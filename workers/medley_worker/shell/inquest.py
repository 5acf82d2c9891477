"""What follows an engine's death: who was in its step, whether the next engine can run at all, and what is held
against whom.

A death is held against its suspects only once the next engine has answered a canary: where that dies or fails too,
the machine or the model is at fault, and the worker leaves without a word against its jobs. Owns the suspects until
then, and the pace of restarts. Starts and ends no engine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from uuid import UUID

import structlog
from sqlalchemy import Connection

from medley.db.crashes import record_crash
from medley.db.ends import Result
from medley.spec.errors import ErrorCode, JobError
from medley.spec.ids import uuid7
from medley.spec.jobs import JobState
from medley.spec.wire import Finished, JobKey
from medley_worker.shell.canary import Canary
from medley_worker.shell.engine_link import EngineLink
from medley_worker.shell.held import Held, HeldJobs
from medley_worker.shell.isolation import Deaths
from medley_worker.shell.results import Results
from medley_worker.shell.transactions import Transactions

log = structlog.get_logger()


class EngineUseless(Exception):
    """Engines die without having run anything, or cannot run the base model: the model or the machine is at fault."""


class Inquest:
    """Over the engines of one worker, one after another."""

    def __init__(self, worker: UUID, transactions: Transactions, held: HeldJobs, results: Results) -> None:
        self._worker = worker
        self._transactions = transactions
        self._held = held
        self._results = results
        self._canary: Canary | None = None  # of the present engine, until it is proven
        self._suspects: list[JobKey] = []  # of a death that is not held against them yet
        self._deaths = Deaths()
        self._start_at_s = 0.0  # monotonic: no engine before

    @property
    def is_open(self) -> bool:
        """Whether the present engine has still to prove itself."""
        return self._canary is not None

    @property
    def wait_s(self) -> float:
        """Seconds until the next engine may start."""
        return max(0.0, self._start_at_s - time.monotonic())

    def begin(self) -> None:
        """An engine is about to start; it gets a canary where there are suspects."""
        self._canary = Canary() if self._suspects else None

    def hear(self, message: Finished) -> bool:
        """What an engine has finished, on its link's thread. Whether it was the canary."""
        self._deaths.worked()
        canary = self._canary
        return canary is not None and canary.hear(message)

    def is_proven(self, link: EngineLink) -> bool:
        """Whether the loaded engine may have jobs; what it shows is held against the suspects then.

        Raises EngineUseless where it cannot even run the base model.
        """
        canary = self._canary
        if canary is None:
            return True
        if not canary.is_sent:
            canary.is_sent = True
            link.add([canary.item])
        if not canary.is_answered:
            return False
        if canary.fault is not None:
            raise EngineUseless(f"after a death the base model fails without any job: {canary.fault}")
        self._canary = None
        suspects, self._suspects = self._suspects, []
        self._quarantine(suspects)
        return True

    def died(self, suspects: Sequence[JobKey]) -> None:
        """The engine is dead; these were in its step. Raises EngineUseless where another one makes no sense."""
        was_proving = self._canary is not None and self._canary.is_sent
        self._canary = None
        if was_proving:
            raise EngineUseless("after a death the base model ends the next engine too, without any job")
        self._suspects = list(suspects) or self._suspects
        wait_s = self._deaths.died(len(suspects))
        if wait_s is None:
            raise EngineUseless("engines end one after another before they run a job; their own lines say why")
        self._start_at_s = time.monotonic() + wait_s

    def stopped(self) -> None:
        """The engine was ended at our word: it proves nothing any more."""
        self._canary = None

    def acquit(self) -> None:
        """Suspects go back as innocent: nothing has shown that the engine was not at fault."""
        self._suspects = []

    def _quarantine(self, suspects: Sequence[JobKey]) -> None:
        """Hold a death against its suspects, and end those that are quarantined for it."""
        death = uuid7()  # the note may be repeated and counts once

        def record(conn: Connection) -> tuple[set[UUID], set[UUID]]:
            return record_crash(conn, self._worker, [(key.job, key.attempt) for key in suspects], death=death)

        jobs, revisions = self._transactions.insist("recording a crash", record)
        if not jobs and not revisions:
            return

        def is_guilty(held: Held) -> bool:
            return held.key.job in jobs or held.revision in revisions

        results = [_quarantined(held, is_job=held.key.job in jobs) for held in self._held.end_waiting(is_guilty)]
        log.error(
            "jobs.quarantined",
            worker=self._worker.hex,
            num_jobs=len(results),
            jobs=[job.hex for job in sorted(jobs)],
            revisions=[revision.hex for revision in sorted(revisions)],
        )
        self._results.put(results)


def _quarantined(held: Held, *, is_job: bool) -> Result:
    if is_job:
        code = ErrorCode.JOB_QUARANTINED
        message = "this job ended the engine each time that it ran alone; it will not be run again"
    else:
        code = ErrorCode.ADAPTER_QUARANTINED
        message = "this adapter revision ended engines by itself and was quarantined; upload a corrected one"
    return Result(
        job=held.key.job,
        attempt=held.key.attempt,
        state=JobState.FAILED,
        error=JobError(code=code, message=message),
    )
