"""The engine's life: started when the worker is to be active, stopped when not, and what follows when it dies.

Owns the engine process and the worker's state; one thread, level-triggered: whoever changes something wakes it, it
looks at how things stand. Knows no text and no SQL beyond `record_crash` and `leave`.

An engine's death is held against the jobs in its step only once the next engine has answered a canary: where that
dies or fails too, the machine or the model is at fault, and the worker leaves without a word against its jobs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from uuid import UUID

import structlog
from sqlalchemy import Connection

from medley.db import workers
from medley.db.crashes import record_crash
from medley.db.ends import Result
from medley.db.workers import Room, WorkerState
from medley.spec.errors import ErrorCode, JobError
from medley.spec.ids import uuid7
from medley.spec.jobs import JobState
from medley.spec.wire import EngineConfig, Finished, FromEngine, JobKey, Ready, Release
from medley_worker.shell.canary import Canary
from medley_worker.shell.engine_link import EngineLink
from medley_worker.shell.feed import Feed
from medley_worker.shell.held import Held, HeldJobs
from medley_worker.shell.isolation import Deaths
from medley_worker.shell.outcomes import Outcomes
from medley_worker.shell.report import Report
from medley_worker.shell.results import Results
from medley_worker.shell.transactions import Transactions

RELEASE_S = 4.0  # for the engine to give everything back; a step may be running
STOP_S = 1.5  # for an idle engine to end by itself
FLUSH_S = 3.0  # for the last results and releases; together within the 10 s that a worker has to stop
LOOK_S = 1.0
LOAD_STALL_S = 1_800.0  # it is silent while it loads; jobs that outlived the last engine wait for that

log = structlog.get_logger()


class EngineUseless(Exception):
    """Engines die without having run anything, or cannot run the base model: the model or the machine is at fault."""


class Controller:
    """on_state: called after each change of the worker's state. on_leave: called before the worker leaves.

    stall_s: a loaded engine speaks each second, and between steps; one that is silent for longer is taken for dead.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        worker: UUID,
        transactions: Transactions,
        held: HeldJobs,
        feed: Feed,
        results: Results,
        report: Report,
        outcomes: Outcomes,
        on_state: Callable[[], None],
        on_leave: Callable[[], None],
        stall_s: float,
    ) -> None:
        self._config = config
        self._stall_s = stall_s
        self._worker = worker
        self._transactions = transactions
        self._held = held
        self._feed = feed
        self._results = results
        self._report = report
        self._outcomes = outcomes
        self._on_state = on_state
        self._on_leave = on_leave
        self._wake = threading.Event()
        self._desired = WorkerState.ASLEEP
        self._is_stopping = False
        self._link: EngineLink | None = None
        self._ready: Ready | None = None
        self._canary: Canary | None = None  # of the present engine, until it is proven
        self._suspects: list[JobKey] = []  # of a death that is not held against them yet
        self._deaths = Deaths()
        self._start_at_s = 0.0  # monotonic: not before

    def accepts(self) -> bool:
        """Whether jobs assigned to this worker are taken in, now or as soon as the engine is loaded."""
        return self._desired is WorkerState.ACTIVE and not self._is_stopping

    def max_model_len(self) -> int | None:
        """Of the loaded engine, in tokens."""
        ready = self._ready
        return None if ready is None else ready.max_model_len

    def desire(self, state: WorkerState) -> None:
        if state is not self._desired:
            log.info("worker.desired", worker=self._worker.hex, state=state.value)
            self._desired = state
            self._wake.set()

    def stop(self) -> None:
        """Give everything back and leave."""
        self._is_stopping = True
        self._wake.set()

    def kill_engine(self) -> None:
        """For the end of the process: without a word to anybody."""
        if self._link is not None:
            self._link.kill()

    def run(self) -> None:
        """Until the worker has left. Raises EngineUseless after giving everything back."""
        try:
            while not (self._is_stopping or self._desired is WorkerState.GONE):
                self._turn()
                self._wake.wait(self._wait_s())
                self._wake.clear()
        except EngineUseless:
            self._leave()
            raise
        try:
            self._leave()
        except EngineUseless:  # the engine died while it was asked for its jobs: what it had still goes back
            self._leave()

    def _turn(self) -> None:
        link = self._link
        if link is not None and link.has_ended:
            self._bury(link)
        elif link is not None and link.silent_s > (LOAD_STALL_S if self._ready is None else self._stall_s):
            log.error("engine.stalled", worker=self._worker.hex, pid=link.pid, silent_s=round(link.silent_s))
            link.kill()  # and its next turn finds the suspects
        elif self._desired is not WorkerState.ACTIVE:
            if link is not None or self._report.state is not WorkerState.ASLEEP:
                self._drain()
                self._stand(WorkerState.ASLEEP)
        elif link is None:
            if time.monotonic() >= self._start_at_s:
                self._start()
        elif self._ready is not None and self._report.state is WorkerState.WAKING and self._is_proven(link):
            self._open(link, self._ready)

    def _wait_s(self) -> float:
        return min(LOOK_S, max(0.0, self._start_at_s - time.monotonic()) or LOOK_S)

    def _stand(self, state: WorkerState, room: Room | None = None) -> None:
        self._report.stands(state, room)
        log.info("worker.stands", worker=self._worker.hex, state=state.value)
        self._on_state()

    def _start(self) -> None:
        self._ready = None
        self._canary = Canary() if self._suspects else None
        self._link = EngineLink(self._config, on_messages=self._hear, on_end=self._wake.set)
        log.info("engine.started", worker=self._worker.hex, pid=self._link.pid)
        self._stand(WorkerState.WAKING)

    def _hear(self, messages: list[FromEngine]) -> None:
        """On the link's thread: what is said of the engine itself is kept here, what is said of jobs goes on."""
        for message in messages:
            if isinstance(message, Ready):
                self._ready = message
                self._wake.set()
            elif isinstance(message, Finished):
                self._deaths.worked()
                if self._canary is not None and self._canary.hear(message):
                    self._wake.set()
        self._outcomes.take(messages)

    def _is_proven(self, link: EngineLink) -> bool:
        """Whether the loaded engine may have jobs. Raises EngineUseless where it cannot even run the base model."""
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

    def _open(self, link: EngineLink, ready: Ready) -> None:
        log.info("engine.loaded", worker=self._worker.hex, pid=link.pid, load_s=round(ready.load_s, 2))
        room = Room(ready.max_num_seqs, ready.num_pages, ready.page_size, ready.num_tiles)
        self._stand(WorkerState.ACTIVE, room)
        self._feed.open(link)

    def _drain(self) -> None:
        """Give every job back, with what it has generated, and stop the engine."""
        self._report.drains()
        self._on_state()
        link = self._link
        if link is not None:
            self._feed.close()
            link.send(Release(None))
            deadline = time.monotonic() + RELEASE_S
            while not link.has_ended and time.monotonic() < deadline:
                if self._held.wait_engine_empty(0.05):
                    break
            if link.has_ended:
                self._bury(link)
            else:
                link.stop(STOP_S)
                self._forget_engine()
        self._suspects = []  # they go back as innocent: nothing has shown that the engine was not at fault
        self._results.give_back_waiting()
        if not self._held.wait_empty(FLUSH_S):
            log.warning("worker.unflushed", worker=self._worker.hex, num_jobs=len(self._held))

    def _forget_engine(self, *, is_death: bool = False) -> list[JobKey]:
        self._feed.close()
        self._link = self._ready = self._canary = None
        self._report.engine_ended()
        return self._held.put_back(is_death=is_death)

    def _bury(self, link: EngineLink) -> None:
        """An engine has died: find the suspects; the next engine's canary decides whether they are held to it."""
        was_proving = self._canary is not None and self._canary.is_sent
        suspects = self._forget_engine(is_death=True)
        log.error("engine.died", worker=self._worker.hex, pid=link.pid, num_suspects=len(suspects))
        if was_proving:
            raise EngineUseless("after a death the base model ends the next engine too, without any job")
        self._suspects = suspects or self._suspects
        wait_s = self._deaths.died(len(suspects))
        if wait_s is None:
            raise EngineUseless("engines end one after another before they run a job; their own lines say why")
        self._start_at_s = time.monotonic() + wait_s

    def _quarantine(self, suspects: list[JobKey]) -> None:
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

    def _leave(self) -> None:
        self._is_stopping = True
        self._drain()
        self._on_leave()
        self._transactions.insist("leaving", lambda conn: workers.leave(conn, self._worker))
        log.info("worker.left", worker=self._worker.hex)


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
