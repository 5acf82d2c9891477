"""The engine process: `python -m medley_worker.engine.process --fd N`, a loop around one Engine.

Owns the socket to the shell that started it and dies with it. The first frame is an EngineConfig; after it come
ToEngine messages, and FromEngine messages go back (medley/spec/wire.py). It knows jobs by their keys only.

Whatever is wrong with one job ends as its Finished with an error. What is wrong with the process ends the
process: the shell sees which jobs were named as Running and not reported since.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import msgspec
import structlog
import torch

from medley.garbage import collect_rarely
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import Checkpoint
from medley.spec.wire import (
    Abort,
    Add,
    Asleep,
    Awake,
    Batch,
    EngineConfig,
    EngineStats,
    Finished,
    Forget,
    FrameReader,
    FromEngine,
    JobKey,
    Progress,
    Ready,
    Release,
    Released,
    Running,
    Shutdown,
    Sleep,
    ToEngine,
    Upcoming,
    Wake,
    WorkItem,
    encode_frame,
    to_engine_decoder,
)
from medley_worker.engine.engine import Engine
from medley_worker.engine.outbox import Outbox
from medley_worker.engine.parallel.followers import end_process, rank_device
from medley_worker.engine.requests import Request, RequestOutput
from medley_worker.engine.sequences import AlreadyInFlight, Refused, RequestId
from medley_worker.engine.sizing import cpu_threads
from medley_worker.parents import die_with_parent

STATS_INTERVAL_S = 1.0
_RECEIVE_BYTES = 1 << 20
_CRASHED = 137  # what a SIGKILLed process reports
_USELESS = 3  # its memory could not be given back, or not be had again

log = structlog.get_logger()


class Failpoint:
    """For fault tests. `die_on_token=<id>`: die in the step that first holds a job with this token in its prompt;
    `die_on_step=always`, `die_on_sleep=always`, `die_on_wake=always`: die in the first of these, whatever it holds.
    """

    def __init__(self, text: str | None) -> None:
        name, _, value = (text or "").partition("=")
        self._is_fatal = (name, value) == ("die_on_step", "always")
        self._fatal_change = name if name in ("die_on_sleep", "die_on_wake") and value == "always" else None
        self._token_id: int | None = None
        self._doomed: set[RequestId] = set()
        if text is not None and not self._is_fatal and self._fatal_change is None:
            if name != "die_on_token" or not value.isdecimal():
                raise ValueError(
                    f"MEDLEY_ENGINE_FAILPOINT: got {text!r}, wanted die_on_token=<token id> or die_on_step=always,"
                    " die_on_sleep=always, die_on_wake=always"
                )
            self._token_id = int(value)

    def see(self, item: WorkItem) -> None:
        if self._token_id is not None and self._token_id in item.prompt_token_ids:
            self._doomed.add(item.key)

    def entering(self, request_ids: Iterable[RequestId]) -> None:
        if self._is_fatal or not self._doomed.isdisjoint(request_ids):
            os._exit(_CRASHED)

    def changing(self, what: str) -> None:
        """what: "sleep" or "wake"."""
        if self._fatal_change == f"die_on_{what}":
            os._exit(_CRASHED)


class Service:
    """One engine at the end of a socket: takes messages from `inbox`, answers through `outbox`."""

    def __init__(self, engine: Engine, inbox: queue.SimpleQueue[bytes], outbox: Outbox, failpoint: Failpoint) -> None:
        self._engine = engine
        self._inbox = inbox
        self._outbox = outbox
        self._failpoint = failpoint
        self._stats_at = time.monotonic()  # when the next statistics are due
        self._said_batch = Batch()
        engine.on_entering = self._entering

    def run(self) -> None:
        """Work until the shell says Shutdown."""
        while self._take_messages():
            if self._engine.has_work:
                self._report(self._engine.step())
            now = time.monotonic()
            if now >= self._stats_at:
                self._stats_at = now + STATS_INTERVAL_S
                self._send(*self._batch(), self._stats())
        self._send(self._stats())

    def _stats(self) -> EngineStats:
        config = self._engine.config
        if config.device == "cpu":
            return self._engine.stats()
        devices = [rank_device(config, rank) for rank in range(config.tensor_parallel)]
        total = sum(torch.cuda.get_device_properties(device).total_memory for device in devices)
        return msgspec.structs.replace(self._engine.stats(), device_total_bytes=total)

    def _batch(self) -> list[Batch]:
        """Who is in the rows now; nothing while there is no work and was none."""
        decoding, prefilling = self._engine.in_rows()
        batch = Batch(cast(tuple[JobKey, ...], tuple(decoding)), cast(tuple[JobKey, ...], tuple(prefilling)))
        was, self._said_batch = self._said_batch, batch
        return [batch] if self._engine.has_work or was != batch else []

    def _take_messages(self) -> bool:
        """Handle what has arrived; without work, wait for it. False after Shutdown."""
        wait_s = 0.0 if self._engine.has_work else max(0.0, self._stats_at - time.monotonic())
        try:
            body = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                message = to_engine_decoder.decode(body)
                if isinstance(message, Shutdown):
                    return False
                self._handle(message)
                body = self._inbox.get_nowait()
        except queue.Empty:
            return True

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Add(items=items):
                for item in items:
                    self._add(item)
            case Abort(keys=keys):
                self._engine.abort(keys)
            case Release(keys=keys):
                released = cast(Mapping[JobKey, Checkpoint], self._engine.release(keys))
                self._send(*(Released(key=key, checkpoint=kept) for key, kept in released.items()))
                self._report(self._engine.take_outputs())  # a Shutdown may come before the next step
            case Upcoming(adapters=adapters):
                self._engine.set_upcoming(adapters)
            case Forget(adapters=adapters):
                self._engine.forget(adapters)
            case Sleep():
                self._failpoint.changing("sleep")
                sleep_s = _timed(self._engine.sleep, "engine.sleepless")
                self._send(Asleep(device_bytes=self._engine.device_bytes, sleep_s=sleep_s), self._stats())
            case Wake():
                self._failpoint.changing("wake")
                self._send(Awake(wake_s=_timed(self._engine.wake, "engine.unwakeable")))

    def _add(self, item: WorkItem) -> None:
        request = Request(item.prompt_token_ids, item.adapter, item.sampling, item.num_continuation)
        self._failpoint.see(item)
        try:
            self._engine.add_request(
                item.key,
                request,
                item.checkpoint,
                item.priority,
                stream=item.want_progress,
                is_sampling_checked=True,  # when the job was made
            )
        except Refused as refused:
            self._send(_failed(item.key, refused.error))
        except AlreadyInFlight as error:
            log.warning("job.sent_twice", job=str(item.key.job), attempt=item.key.attempt, reason=str(error))
        except Exception as error:
            # Not announced, this job would not be suspected of ending the process, and come again and again.
            # Neither the error's text nor its locals, which hold the prompt.
            place = traceback.extract_tb(error.__traceback__)[-1]
            log.error(
                "job.untaken",
                job=str(item.key.job),
                attempt=item.key.attempt,
                error=type(error).__name__,
                where=f"{place.filename}:{place.lineno}",
            )
            message = f"the engine could not take the job in: {type(error).__name__}"
            self._send(_failed(item.key, JobError(code=ErrorCode.ENGINE, message=message)))

    def _entering(self, request_ids: list[RequestId]) -> None:
        """Before the first work on these jobs: the shell must know whom to suspect if the process dies in it."""
        self._send(Running(keys=cast(tuple[JobKey, ...], tuple(request_ids))))
        self._outbox.flush()
        self._failpoint.entering(request_ids)

    def _report(self, outputs: list[RequestOutput]) -> None:
        self._send(*(_message(output) for output in outputs))

    def _send(self, *messages: FromEngine) -> None:
        if messages:
            self._outbox.put(b"".join(map(encode_frame, messages)))


def _timed(change: Callable[[], None], event_on_failure: str) -> float:
    """Seconds that a change of the engine's memory took. Raises SystemExit where it failed: what there is of it now
    is not known.
    """
    started = time.monotonic()
    try:
        change()
    except (RuntimeError, OSError, MemoryError) as error:
        log.error(event_on_failure, reason=str(error))
        raise SystemExit(_USELESS) from None
    return time.monotonic() - started


def _message(output: RequestOutput) -> Finished | Progress:
    key = cast(JobKey, output.request_id)
    if not output.is_finished:
        return Progress(key=key, token_ids=output.new_token_ids, logprobs=output.new_logprobs, details=output.details)
    return Finished(
        key=key,
        token_ids=output.token_ids,
        logprobs=output.logprobs,
        finish_reason=output.finish_reason,
        error=output.error,
        details=output.details,
    )


def _failed(key: JobKey, error: JobError) -> Finished:
    return Finished(key=key, token_ids=(), logprobs=(), finish_reason=None, error=error)


def read_bodies(connection: socket.socket, inbox: queue.SimpleQueue[bytes]) -> None:
    """Put each message body into `inbox`; end the process when the shell has gone. Runs on a thread of its own.

    os._exit and not an exception: a step may take seconds, and there is nothing to save that nobody reads.
    """
    reader = FrameReader()
    try:
        while data := connection.recv(_RECEIVE_BYTES):
            for body in reader.feed(data):
                inbox.put(body)
    except (OSError, ValueError) as error:
        log.error("shell.unreadable", reason=str(error))
    os._exit(0)


def main() -> int:
    """Serve the socket `--fd` until Shutdown or its end.

    Exit status 2: the engine could not be built; 3: its memory could not be given back, or not be had again.
    """
    parser = argparse.ArgumentParser(prog="medley_worker.engine.process")
    parser.add_argument("--fd", type=int, required=True, help="an open socket to the shell")
    arguments = parser.parse_args()
    die_with_parent()
    # Ctrl-C reaches the whole terminal group; the shell decides how to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # structlog's own choice would print the local variables of each frame.
            structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    connection = socket.socket(fileno=arguments.fd)
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=read_bodies, args=(connection, inbox), name="inbox", daemon=True).start()
    started = time.monotonic()
    config = msgspec.msgpack.decode(inbox.get(), type=EngineConfig)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, cpu_threads() // max(1, config.tensor_parallel)))
    try:
        failpoint = Failpoint(os.environ.get("MEDLEY_ENGINE_FAILPOINT"))
        engine = Engine(config, on_rank_death=end_process)
        engine.prepare_grammars()
    except (ValueError, OSError) as error:
        log.error("engine.unbuildable", reason=str(error))
        return 2
    outbox = Outbox(connection)
    collect_rarely()
    load_s = time.monotonic() - started
    outbox.put(encode_frame(_ready(engine, load_s)))
    log.info("engine.ready", load_s=round(load_s, 2), num_pages=engine.sizes.num_pages)
    Service(engine, inbox, outbox, failpoint).run()
    outbox.close()
    engine.close()
    return 0


def _ready(engine: Engine, load_s: float) -> Ready:
    sizes = engine.sizes
    return Ready(
        max_num_seqs=sizes.max_num_seqs,
        max_model_len=sizes.max_model_len,
        num_pages=sizes.num_pages,
        page_size=sizes.page_size,
        num_tiles=engine.stats().num_tiles,
        vocab_size=engine.vocab_size,
        load_s=load_s,
        can_sleep=engine.can_sleep,
    )


if __name__ == "__main__":
    sys.exit(main())
