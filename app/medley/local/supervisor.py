"""Runs children in the foreground: one log, restarts with backoff, an orderly end.

It knows commands and nothing of what they do. One thread does everything, since the kernel ties a child's death
to the thread that started it: call it from the main thread, and let `watch` be where that thread waits.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from medley.local.child import Child, Command, describe_status
from medley.local.lines import LineLog, LineReader

# A crash is answered at once, a crash loop ever more slowly.
_BACKOFF_FIRST_S = 0.2
_BACKOFF_MAX_S = 10.0
# A child that ran this long has started well; its next crash counts as the first.
_BACKOFF_RESET_S = 20.0
_MAX_WAIT_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal asked for the end while something was still awaited."""


class ChildFailed(Exception):
    """A child that had to succeed did not."""


@dataclass(frozen=True)
class Unit:
    """A child to keep running. `command` is built anew for each start."""

    name: str
    command: Callable[[], Command]
    stop_stage: int
    stop_grace_s: float


class _Kept:
    """A unit, its present child, and when to start the next one."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.child: Child | None = None
        self.crashes = 0
        self.start_at_s: float | None = None


class Supervisor:
    """Owns children, their pipes and this process's signals, from `__enter__` to `__exit__`."""

    def __init__(self, log: LineLog, *, on_change: Callable[[dict[str, int]], None]) -> None:
        """`on_change` gets the process ids by name after each start and each end."""
        self._log = log
        self._on_change = on_change
        self._kept: dict[str, _Kept] = {}
        self._selector = selectors.DefaultSelector()
        self._num_signals = 0
        self._unlogged: list[str] = []
        self._stack = contextlib.ExitStack()

    @property
    def is_stopping(self) -> bool:
        return self._num_signals > 0

    def pids(self) -> dict[str, int]:
        return {name: kept.child.pid for name, kept in self._kept.items() if kept.child is not None}

    def crashes(self) -> dict[str, int]:
        """How often each unit has ended in a row, without a good run between."""
        return {name: kept.crashes for name, kept in self._kept.items()}

    def __enter__(self) -> Supervisor:
        self._stack.enter_context(self._signals())
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self.stop_all()
        finally:
            self._stack.close()

    def run_once(self, unit: Unit) -> None:
        """Run it to its end. Raises `ChildFailed` unless it ends with status 0, `Stopped` on a signal."""
        child = self._spawn(unit)
        try:
            self.wait_for(lambda: child.exit_status() is not None)
        finally:
            status = child.stop(unit.stop_grace_s) if child.exit_status() is None else child.exit_status()
            self._pump(0)
        if status != 0:
            raise ChildFailed(f"{unit.name} ended with {describe_status(status or 0)}; its last lines say why")

    def keep(self, unit: Unit) -> None:
        """Start it, and start it again whenever it ends, until `stop_all`."""
        self._kept[unit.name] = kept = _Kept(unit)
        self._start(kept)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Serve children until `condition` holds; False after `timeout_s`. Raises `Stopped` on a signal."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not condition():
            if self.is_stopping:
                raise Stopped
            if deadline is not None and time.monotonic() > deadline:
                return False
            self._turn(0.05)
        return True

    def watch(self) -> None:
        """Serve children until a signal asks for the end."""
        while not self.is_stopping:
            self._turn(_MAX_WAIT_S)

    def stop_all(self) -> None:
        """Stop all children, stage by stage. A second signal kills what is left of each stage at once."""
        for stage in sorted({kept.unit.stop_stage for kept in self._kept.values()}):
            self._stop_stage([kept for kept in self._kept.values() if kept.unit.stop_stage == stage])
        self._kept.clear()
        self._pump(0)

    def _stop_stage(self, stage: list[_Kept]) -> None:
        signals_before = max(self._num_signals, 1)
        children = {kept.unit.name: (kept.child, kept.unit.stop_grace_s) for kept in stage if kept.child is not None}
        started_s = time.monotonic()
        for kept in stage:
            kept.start_at_s = None
            if kept.child is not None:
                kept.child.send(kept.child.command.stop_signal)
        while running := {n: (c, grace) for n, (c, grace) in children.items() if c.exit_status() is None}:
            for name, (child, grace_s) in running.items():
                if self._num_signals > signals_before or time.monotonic() - started_s > grace_s:
                    self._log.write("up", f"{name} has not stopped: killing it")
                    child.kill()
                    child.wait(grace_s)
            self._pump(0.05)
        for kept in stage:
            kept.child = None

    def _turn(self, wait_s: float) -> None:
        now_s = time.monotonic()
        due = [kept.start_at_s - now_s for kept in self._kept.values() if kept.start_at_s is not None]
        self._pump(max(0.0, min([wait_s, *due])))
        for kept in self._kept.values():
            self._reap(kept)
            if kept.start_at_s is not None and kept.start_at_s <= time.monotonic():
                self._start(kept)

    def _reap(self, kept: _Kept) -> None:
        child = kept.child
        if child is None or (status := child.exit_status()) is None:
            return
        ran_s = time.monotonic() - child.started_at_s
        kept.crashes = 1 if ran_s > _BACKOFF_RESET_S else kept.crashes + 1
        pause_s = min(_BACKOFF_FIRST_S * 2 ** (kept.crashes - 1), _BACKOFF_MAX_S)
        kept.child = None
        kept.start_at_s = time.monotonic() + pause_s
        how = describe_status(status)
        self._log.write("up", f"{kept.unit.name} ended with {how} after {ran_s:.1f} s: again in {pause_s:g} s")
        self._on_change(self.pids())

    def _start(self, kept: _Kept) -> None:
        kept.start_at_s = None
        kept.child = self._spawn(kept.unit)
        self._on_change(self.pids())

    def _spawn(self, unit: Unit) -> Child:
        read_end, write_end = os.pipe()
        try:
            child = Child(unit.command(), output=write_end)
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        os.set_blocking(read_end, False)
        self._selector.register(read_end, selectors.EVENT_READ, LineReader(unit.name, self._log))
        return child

    def _pump(self, wait_s: float) -> None:
        """Pass on what children wrote, waiting up to `wait_s` for something to happen."""
        events = self._selector.select(wait_s)
        while self._unlogged:
            self._log.write("up", f"{self._unlogged.pop(0)}: stopping; once more kills what is left")
        for key, _ in events:
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(key.fd, 4096)
            elif not key.data.read_from(key.fd):
                self._selector.unregister(key.fd)
                os.close(key.fd)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Count the signals that ask for the end; those and a child's end wake the selector."""
        read_end, write_end = os.pipe()
        os.set_blocking(read_end, False)
        os.set_blocking(write_end, False)
        self._selector.register(read_end, selectors.EVENT_READ, None)
        previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(previous_fd)
            for key in list(self._selector.get_map().values()):
                self._selector.unregister(key.fd)
                os.close(key.fd)
            os.close(write_end)

    def _on_signal(self, number: int, _frame: object) -> None:
        # Not logged here: the handler may have interrupted the log in the middle of a line.
        self._num_signals += 1
        self._unlogged.append(signal.Signals(number).name)
