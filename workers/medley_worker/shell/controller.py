"""The engine's life: started or woken when the worker is to be active, put to sleep or stopped when not, and what
follows when it dies.

Owns the engine process and the worker's state; one thread, level-triggered: whoever changes something wakes it, it
looks at how things stand. Knows no text and no SQL beyond `record_crash` and `leave`.

An engine's death is held against the jobs in its step only once the next engine has answered a canary: where that
dies or fails too, the machine or the model is at fault, and the worker leaves without a word against its jobs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum, auto
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
from medley.spec.wire import Asleep, Awake, EngineConfig, Finished, FromEngine, JobKey, Ready, Release, Sleep, Wake
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
SLEEP_S = 60.0  # for the engine to give its memory back, which copies the weights the first time, or to have it again
LOOK_S = 1.0
STALL_S = 300.0  # a loaded engine speaks each second, and between steps; no step takes this long
LOAD_STALL_S = 1_800.0  # it is silent while it loads; jobs that outlived the last engine wait for that

log = structlog.get_logger()


class EnginePhase(Enum):
    """Where an engine stands that has not ended."""

    LOADING = auto()
    AWAKE = auto()
    FALLING_ASLEEP = auto()  # told to sleep
    ASLEEP = auto()
    WAKING = auto()  # told to wake


_STALLS_S = {EnginePhase.LOADING: LOAD_STALL_S, EnginePhase.WAKING: SLEEP_S}


class EngineUseless(Exception):
    """Engines die without having run anything, or cannot run the base model: the model or the machine is at fault."""


class Controller:
    """on_state: called after each change of the worker's state. on_leave: called before the worker leaves.

    keeps_engine: an engine sleeps while the worker does, where it can; else it is stopped. warms_engine: one is loaded
    for that at once, without waiting for the first wake.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        keeps_engine: bool,
        warms_engine: bool,
        worker: UUID,
        transactions: Transactions,
        held: HeldJobs,
        feed: Feed,
        results: Results,
        report: Report,
        outcomes: Outcomes,
        on_state: Callable[[], None],
        on_leave: Callable[[], None],
    ) -> None:
        self._config = config
        self._keeps_engine, self._warms_engine = keeps_engine, warms_engine
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
        self._fell_asleep = threading.Event()
        self._desired = WorkerState.ASLEEP
        self._is_stopping = False
        self._link: EngineLink | None = None
        self._phase = EnginePhase.LOADING  # of that engine
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
        elif link is not None and link.silent_s > _STALLS_S.get(self._phase, STALL_S):
            log.error("engine.stalled", worker=self._worker.hex, pid=link.pid, silent_s=round(link.silent_s))
            link.kill()  # and its next turn finds the suspects
        elif self._desired is WorkerState.ACTIVE:
            self._advance(link)
        elif self._report.state is not WorkerState.ASLEEP:
            self._drain(keeps_engine=self._keeps_engine)
            self._stand(WorkerState.ASLEEP)
        else:
            self._warm(link)

    def _advance(self, link: EngineLink | None) -> None:
        """One step towards an engine that works."""
        if link is None:
            if time.monotonic() >= self._start_at_s:
                self._start()
                self._stand(WorkerState.WAKING)
            return
        if self._phase is EnginePhase.ASLEEP:
            self._phase = EnginePhase.WAKING
            link.send(Wake())
        if self._report.state is WorkerState.ASLEEP:
            self._stand(WorkerState.WAKING)
        is_up = self._phase is EnginePhase.AWAKE and self._report.state is WorkerState.WAKING
        if is_up and self._ready is not None and self._is_proven(link):
            self._open(link, self._ready)

    def _warm(self, link: EngineLink | None) -> None:
        """One step towards an engine that sleeps, while the worker stands asleep."""
        if link is None:
            if self._warms_engine and time.monotonic() >= self._start_at_s:
                self._start()
        elif self._phase is EnginePhase.AWAKE:
            self._put_to_sleep(link)

    def _wait_s(self) -> float:
        return min(LOOK_S, max(0.0, self._start_at_s - time.monotonic()) or LOOK_S)

    def _stand(self, state: WorkerState, room: Room | None = None) -> None:
        self._report.stands(state, room)
        log.info("worker.stands", worker=self._worker.hex, state=state.value)
        self._on_state()

    def _start(self) -> None:
        self._ready, self._phase = None, EnginePhase.LOADING
        self._canary = Canary() if self._suspects else None
        self._link = EngineLink(self._config, on_messages=self._hear, on_end=self._wake.set)
        log.info("engine.started", worker=self._worker.hex, pid=self._link.pid)

    def _hear(self, messages: list[FromEngine]) -> None:
        """On the link's thread: what is said of the engine itself is kept here, what is said of jobs goes on."""
        for message in messages:
            if isinstance(message, Ready):
                self._ready, self._phase = message, EnginePhase.AWAKE
                log.info("engine.loaded", worker=self._worker.hex, load_s=round(message.load_s, 2))
                self._wake.set()
            elif isinstance(message, Asleep):
                self._phase = EnginePhase.ASLEEP
                self._fell_asleep.set()
                sleep_s, mib = round(message.sleep_s, 2), message.device_bytes >> 20
                log.info("engine.asleep", worker=self._worker.hex, sleep_s=sleep_s, device_mib=mib)
            elif isinstance(message, Awake):
                self._phase = EnginePhase.AWAKE
                log.info("engine.awake", worker=self._worker.hex, wake_s=round(message.wake_s, 2))
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
        room = Room(ready.max_num_seqs, ready.num_pages, ready.page_size, ready.num_tiles)
        self._stand(WorkerState.ACTIVE, room)
        self._feed.open(link)

    def _drain(self, *, keeps_engine: bool) -> None:
        """Give every job back, with what it has generated; then the engine sleeps or stops."""
        self._report.drains()
        self._on_state()
        link = self._link
        if link is not None:
            self._feed.rest()
            is_empty = self._release_all(link)
            if link.has_ended:
                self._bury(link)
            elif not (keeps_engine and is_empty and (self._can_sleep() or self._is_warming())):
                self._stop_engine(link)
        self._suspects = []  # they go back as innocent: nothing has shown that the engine was not at fault
        self._results.give_back_waiting()
        if not self._held.wait_empty(FLUSH_S):
            log.warning("worker.unflushed", worker=self._worker.hex, num_jobs=len(self._held))
        if self._link is not None and not self._is_warming():
            self._put_to_sleep(self._link)

    def _release_all(self, link: EngineLink) -> bool:
        """Whether the engine has given back every job."""
        link.send(Release(None))
        deadline = time.monotonic() + RELEASE_S
        while not link.has_ended and time.monotonic() < deadline:
            if self._held.wait_engine_empty(0.05):
                return True
        return False

    def _can_sleep(self) -> bool:
        """Whether the engine is known to be sound, and to have a way to sleep."""
        return self._ready is not None and self._ready.can_sleep and self._canary is None

    def _is_warming(self) -> bool:
        """Whether the engine still loads, and may do so for a worker that is asleep."""
        return self._warms_engine and self._phase is EnginePhase.LOADING and self._canary is None

    def _put_to_sleep(self, link: EngineLink) -> None:
        """An engine without jobs gives the device's memory back, or ends where it cannot."""
        if not self._can_sleep():
            log.warning("engine.sleepless", worker=self._worker.hex, pid=link.pid, reason="the device has no way")
            self._warms_engine = False  # the next one could not either
            self._stop_engine(link)
            return
        self._phase = EnginePhase.FALLING_ASLEEP
        self._fell_asleep.clear()
        link.send(Sleep())
        deadline = time.monotonic() + SLEEP_S
        while not (self._fell_asleep.wait(0.05) or link.has_ended or self._is_stopping):
            if time.monotonic() > deadline:
                break
        if not (self._fell_asleep.is_set() or self._is_stopping):
            log.error("engine.sleepless", worker=self._worker.hex, pid=link.pid, reason="it ended or took too long")
            self._warms_engine = False
            self._stop_engine(link)

    def _stop_engine(self, link: EngineLink) -> None:
        link.stop(STOP_S)
        self._forget_engine()

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
        self._drain(keeps_engine=False)
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
