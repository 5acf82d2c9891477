"""The shell's entry point: builds the parts, wires them, starts their threads, ends the process.

Owns signals and exit statuses. A thread that fails unexpectedly ends the process: its supervisor starts another
worker, and the lease of this one runs out.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import structlog
from sqlalchemy import Connection

from medley import logs
from medley.config import Settings
from medley.db import workers
from medley.db.workers import Room, WorkerState
from medley.environment import ConfigError
from medley.garbage import collect_rarely
from medley.objects import StoreError
from medley.rings import Ringer
from medley.spec.ids import uuid7
from medley.spec.wire import EngineConfig
from medley.version import version
from medley_worker.shell.adapter_folders import AdapterFolders
from medley_worker.shell.ahead import Ahead
from medley_worker.shell.controller import Controller
from medley_worker.shell.feed import Feed
from medley_worker.shell.held import HeldJobs
from medley_worker.shell.inbox import Inbox
from medley_worker.shell.inquest import EngineUseless
from medley_worker.shell.intake import Intake, Preparation
from medley_worker.shell.lease import Lease
from medley_worker.shell.messages import Messages
from medley_worker.shell.outcomes import Outcomes
from medley_worker.shell.report import Report
from medley_worker.shell.results import Results
from medley_worker.shell.text import TextCodec, TokenizerMissing
from medley_worker.shell.transactions import Transactions
from medley_worker.shell.watch import Watch

EXIT_OK = 0
EXIT_CRASHED = 1
EXIT_CONFIG = 2
EXIT_ENGINE_USELESS = 3
EXIT_LEASE_LOST = 4  # start again, as a new worker

GRACE_S = 10.0  # from the first signal to the end

log = structlog.get_logger()


class Shell:
    """One worker: all parts, and the threads that run them."""

    def __init__(self, settings: Settings, model_dir: Path, ends: queue.SimpleQueue[int | None]) -> None:
        """`ends` gets the exit status when the worker has ended."""
        self._settings = settings
        self._ends = ends
        self.worker = worker = uuid7()
        self._transactions = transactions = Transactions(settings.database_url, num_threads=7)
        self._ringer = ringer = Ringer(settings.redis_url)
        codec = TextCodec.load(model_dir)
        max_num_seqs = settings.worker.max_num_seqs
        held, report = HeldJobs(), Report(max_num_seqs)
        self._inbox, feed = Inbox(), Feed(held)
        self._lease = lease = Lease(
            transactions, worker, report, lease_s=settings.lease_s, health_file=settings.health_file
        )
        results = Results(
            transactions,
            worker,
            held,
            ringer,
            pool=settings.pool,
            low_water=max_num_seqs,
            on_fenced=lease.renew_soon,
        )
        self._controller = controller = Controller(
            config=engine_config(settings, model_dir),
            keeps_engine=settings.worker.keeps_engine,
            warms_engine=settings.worker.sleep == "warm",
            worker=worker,
            transactions=transactions,
            held=held,
            feed=feed,
            results=results,
            report=report,
            outcomes=Outcomes(codec, held, feed, results, report),
            on_state=lease.renew_soon,
            on_leave=lease.give_up,
            stall_s=settings.worker.engine_stall_s,
        )
        folders = AdapterFolders.open(settings.store_url, settings.worker, self._inbox.put)
        preparation = Preparation(codec, folders, controller.max_model_len)
        accepts = controller.accepts
        intake = Intake(transactions, worker, self._inbox, held, feed, results, preparation, accepts=accepts)
        watch = Watch(transactions, worker, self._inbox, held, feed, results, accepts=accepts)
        self._messages = Messages(settings.redis_url, worker, self._arrive, Ahead(transactions, folders, feed).announce)
        # The lease is first: it is what the others' writes stand on.
        self._threads: dict[str, Callable[[], None]] = {
            "lease": lambda: lease.run(controller.desire, lambda: ends.put(EXIT_LEASE_LOST)),
            "results": results.run,
            "controller": self._control,
            "intake": intake.run,
            "watch": watch.run,
            "messages": self._messages.run,
        }

    def start(self) -> None:
        """Register, asleep, and start every thread. Waits for PostgreSQL."""
        self._transactions.insist("registering", self._register)
        log.info("worker.registered", worker=self.worker.hex, pool=self._settings.pool)
        for name, run in self._threads.items():
            threading.Thread(target=run, name=name, daemon=True).start()

    def stop(self) -> None:
        """Begin to end: give every job back, leave. `ends` tells when it is done."""
        self._controller.stop()

    def close(self) -> None:
        """End what could outlive the process or is worth a farewell; quick, and safe in any state."""
        self._controller.kill_engine()
        self._messages.stop()
        self._ringer.close()

    def _register(self, conn: Connection) -> None:
        workers.register(
            conn,
            self.worker,
            pool=self._settings.pool,
            host=socket.gethostname(),
            pid=os.getpid(),
            room=Room(self._settings.worker.max_num_seqs),
            lease_s=self._settings.lease_s,
            desired=WorkerState.ASLEEP if self._settings.worker.starts_asleep else WorkerState.ACTIVE,
            version=version(),
        )

    def _arrive(self, ids: list[UUID]) -> None:
        self._inbox.put(ids)
        # A message without ids is about the worker's row; one that comes too early may tell of it too.
        if not ids or not self._controller.accepts():
            self._lease.renew_soon()

    def _control(self) -> None:
        try:
            self._controller.run()
        except EngineUseless as error:
            log.error("engine.useless", worker=self.worker.hex, reason=str(error))
            self._ends.put(EXIT_ENGINE_USELESS)
        else:
            self._ends.put(EXIT_OK)


def engine_config(settings: Settings, model_dir: Path) -> EngineConfig:
    worker = settings.worker
    return EngineConfig(
        model_dir=str(model_dir),
        device=worker.device,
        dtype=worker.dtype,
        max_num_seqs=worker.max_num_seqs,
        max_model_len=worker.max_model_len,
        max_num_batched_tokens=worker.max_num_batched_tokens,
        kv_cache_bytes=worker.kv_cache_bytes,
        adapter_bytes=worker.adapter_bytes,
        adapter_slots=worker.adapter_slots,
        load_format=worker.load_format,
        forward=worker.forward,
        seed=worker.seed,
        adapter_host_bytes=worker.adapter_host_bytes,
        max_tpot_ms=worker.max_tpot_ms,
        batch_invariant=worker.batch_invariant,
        tensor_parallel=worker.tensor_parallel,
        sleeps=worker.keeps_engine,
        gpu_share=worker.gpu_share,
    )


def main() -> int:
    """Run one worker to its end. Returns its exit status (or ends the process with it)."""
    try:
        settings = Settings.from_env()
        if settings.model is None:
            raise ConfigError("MEDLEY_MODEL", None, "the folder of the base model")
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CONFIG
    logs.configure("worker", settings)
    ends: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    _end_on_crash(ends)
    try:
        shell = Shell(settings, Path(settings.model), ends)
    except (TokenizerMissing, StoreError, ConfigError, PermissionError) as error:
        log.error("worker.unusable", reason=str(error))
        return EXIT_CONFIG
    _end_on_signals(ends)
    collect_rarely()
    shell.start()
    status = ends.get()
    if status is None:  # a signal
        log.info("worker.stopping", worker=shell.worker.hex)
        shell.stop()
        status = _end_within(ends, GRACE_S)
    log.info("worker.ended", worker=shell.worker.hex, status=status)
    shell.close()
    # Threads may be anywhere, the interpreter must not wait for them.
    sys.stdout.flush()
    os._exit(status)


def _end_within(ends: queue.SimpleQueue[int | None], grace_s: float) -> int:
    try:
        status = ends.get(timeout=grace_s)
    except queue.Empty:
        log.error("worker.overdue", grace_s=grace_s)
        return EXIT_CRASHED
    return EXIT_CRASHED if status is None else status  # a second signal: at once


def _end_on_signals(ends: queue.SimpleQueue[int | None]) -> None:
    def receive(_number: int, _frame: object) -> None:
        ends.put(None)  # the one queue whose put may interrupt itself

    signal.signal(signal.SIGTERM, receive)
    signal.signal(signal.SIGINT, receive)


def _end_on_crash(ends: queue.SimpleQueue[int | None]) -> None:
    def crashed(args: threading.ExceptHookArgs) -> None:
        name = "?" if args.thread is None else args.thread.name
        log.error("thread.crashed", thread=name, exc_info=args.exc_value)
        ends.put(EXIT_CRASHED)

    threading.excepthook = crashed
