"""What the worker is to be, and what it does for that: an engine started or woken, put to sleep or stopped.

Owns the worker's state and the present engine; one thread, level-triggered: whoever changes something wakes it, it
looks at how things stand. Knows no text and no SQL beyond `leave`; what an engine's death means is the inquest's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from uuid import UUID

import structlog

from medley.db import workers
from medley.db.workers import Room, WorkerState
from medley.spec.wire import EngineConfig, Finished, FromEngine, JobKey, Ready, Release
from medley_worker.shell.engine_life import EngineLife, EnginePhase
from medley_worker.shell.feed import Feed
from medley_worker.shell.held import HeldJobs
from medley_worker.shell.inquest import EngineUseless, Inquest
from medley_worker.shell.outcomes import Outcomes
from medley_worker.shell.report import Report
from medley_worker.shell.results import Results
from medley_worker.shell.transactions import Transactions

RELEASE_S = 4.0  # for the engine to give everything back; a step may be running
STOP_S = 1.5  # for an idle engine to end by itself
FLUSH_S = 3.0  # for the last results and releases; together within the 10 s that a worker has to stop
LOOK_S = 1.0

log = structlog.get_logger()


class Controller:
    """on_state: called after each change of the worker's state. on_leave: called before the worker leaves.

    keeps_engine: an engine sleeps while the worker does, where it can; else it is stopped. warms_engine: one is loaded
    for that at once, without waiting for the first wake.
    stall_s: a loaded engine speaks each second, and between steps; one that is silent for longer is taken for dead.
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
        stall_s: float,
    ) -> None:
        self._config = config
        self._keeps_engine, self._warms_engine = keeps_engine, warms_engine
        self._stall_s = stall_s
        self._worker = worker
        self._transactions = transactions
        self._held = held
        self._feed = feed
        self._results = results
        self._report = report
        self._outcomes = outcomes
        self._inquest = Inquest(worker, transactions, held, results)
        self._on_state = on_state
        self._on_leave = on_leave
        self._wake = threading.Event()
        self._desired = WorkerState.ASLEEP
        self._is_stopping = False
        self._engine: EngineLife | None = None

    def accepts(self) -> bool:
        """Whether jobs assigned to this worker are taken in, now or as soon as the engine is loaded."""
        return self._desired is WorkerState.ACTIVE and not self._is_stopping

    def max_model_len(self) -> int | None:
        """Of the loaded engine, in tokens."""
        engine = self._engine
        ready = None if engine is None else engine.ready
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
        engine = self._engine
        if engine is not None:
            engine.link.kill()

    def run(self) -> None:
        """Until the worker has left. Raises EngineUseless after giving everything back."""
        try:
            while not self._is_leaving():
                self._turn()
                self._wake.wait(min(LOOK_S, self._inquest.wait_s or LOOK_S))
                self._wake.clear()
        except EngineUseless:
            self._leave()
            raise
        try:
            self._leave()
        except EngineUseless:  # the engine died while it was asked for its jobs: what it had still goes back
            self._leave()

    def _is_leaving(self) -> bool:
        return self._is_stopping or self._desired is WorkerState.GONE

    def _turn(self) -> None:
        engine = self._engine
        if engine is not None:
            engine.kill_if_stalled()
        if engine is not None and engine.has_ended:
            self._bury(engine)
        elif self._desired is WorkerState.ACTIVE:
            self._advance(engine)
        elif self._report.state is not WorkerState.ASLEEP:
            self._drain(keeps_engine=self._keeps_engine)
            self._stand(WorkerState.ASLEEP)
        else:
            self._warm(engine)

    def _advance(self, engine: EngineLife | None) -> None:
        """One step towards an engine that works."""
        if engine is None:
            if not self._inquest.wait_s:
                self._start()
                self._stand(WorkerState.WAKING)
            return
        engine.wake()
        if self._report.state is WorkerState.ASLEEP:
            self._stand(WorkerState.WAKING)
        is_up = engine.phase is EnginePhase.AWAKE and self._report.state is WorkerState.WAKING
        if is_up and engine.ready is not None and self._inquest.is_proven(engine.link):
            self._open(engine, engine.ready)

    def _warm(self, engine: EngineLife | None) -> None:
        """One step towards an engine that sleeps, while the worker stands asleep."""
        if engine is None:
            if self._warms_engine and not self._inquest.wait_s:
                self._start()
        elif engine.phase is EnginePhase.AWAKE:
            self._put_to_sleep(engine)

    def _stand(self, state: WorkerState, room: Room | None = None) -> None:
        self._report.stands(state, room)
        log.info("worker.stands", worker=self._worker.hex, state=state.value)
        self._on_state()

    def _start(self) -> None:
        self._inquest.begin()
        self._engine = EngineLife(self._config, self._hear, self._wake.set, self._stall_s)

    def _hear(self, messages: list[FromEngine]) -> None:
        """On the link's thread."""
        for message in messages:
            if isinstance(message, Finished) and self._inquest.hear(message):
                self._wake.set()
        self._outcomes.take(messages)

    def _open(self, engine: EngineLife, ready: Ready) -> None:
        room = Room(ready.max_num_seqs, ready.num_pages, ready.page_size, ready.num_tiles)
        self._stand(WorkerState.ACTIVE, room)
        self._feed.open(engine.link)

    def _drain(self, *, keeps_engine: bool) -> None:
        """Give every job back, with what it has generated; then the engine sleeps, goes on loading, or stops."""
        self._report.drains()
        self._on_state()
        engine = self._engine
        if engine is not None:
            self._feed.rest()
            is_empty = self._release_all(engine)
            if engine.has_ended:
                self._bury(engine)
            elif not (keeps_engine and is_empty and self._may_stay(engine)):
                self._stop_engine(engine)
        self._inquest.acquit()
        self._results.give_back_waiting()
        if not self._held.wait_empty(FLUSH_S):
            log.warning("worker.unflushed", worker=self._worker.hex, num_jobs=len(self._held))
        if self._engine is not None and self._engine.phase is not EnginePhase.LOADING:
            self._put_to_sleep(self._engine)

    def _release_all(self, engine: EngineLife) -> bool:
        """Whether the engine has given back every job."""
        engine.link.send(Release(None))
        deadline = time.monotonic() + RELEASE_S
        while not engine.has_ended and time.monotonic() < deadline:
            if self._held.wait_engine_empty(0.05):
                return True
        return False

    def _may_stay(self, engine: EngineLife) -> bool:
        """Whether an engine without jobs may stay while the worker sleeps: to sleep itself, or to load for that."""
        is_warming = self._warms_engine and engine.phase is EnginePhase.LOADING
        return not self._inquest.is_open and (is_warming or engine.can_sleep)

    def _put_to_sleep(self, engine: EngineLife) -> None:
        """An engine without jobs gives the device's memory back, or ends where it cannot."""
        if not engine.can_sleep:
            reason = "the device has no way"
        elif engine.sleep(self._is_leaving) or self._is_leaving():
            return
        else:
            reason = "it ended or took too long"
        log.warning("engine.sleepless", worker=self._worker.hex, pid=engine.link.pid, reason=reason)
        self._warms_engine = False  # the next one could not either
        self._stop_engine(engine)

    def _stop_engine(self, engine: EngineLife) -> None:
        engine.link.stop(STOP_S)
        self._inquest.stopped()
        self._forget_engine(is_death=False)

    def _forget_engine(self, *, is_death: bool) -> list[JobKey]:
        self._feed.close()
        self._engine = None
        self._report.engine_ended()
        return self._held.put_back(is_death=is_death)

    def _bury(self, engine: EngineLife) -> None:
        """An engine has died: its jobs wait again, and there is an inquest."""
        suspects = self._forget_engine(is_death=True)
        log.error("engine.died", worker=self._worker.hex, pid=engine.link.pid, num_suspects=len(suspects))
        self._inquest.died(suspects)
        self._wake.set()  # for the next one, which may start at once

    def _leave(self) -> None:
        self._is_stopping = True
        self._drain(keeps_engine=False)
        self._on_leave()
        self._transactions.insist("leaving", lambda conn: workers.leave(conn, self._worker))
        log.info("worker.left", worker=self._worker.hex)
