"""One foreground child process: how it is started, asked to stop, and made to die with this process.

It knows nothing of what the child does. The kernel sends a child its death signal when the *thread* that
started it ends, so start children from a thread that lives as long as they should.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_DEATHBOUND = str(Path(__file__).with_name("deathbound.py"))


@dataclass(frozen=True)
class Account:
    """The unprivileged account a child runs as."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to run. `argv[0]` is an absolute path; `env` None keeps the caller's."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    account: Account | None = None  # None: the caller's own
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGKILL
    pass_fds: tuple[int, ...] = ()

    def wrapped(self) -> list[str]:
        """The argument vector of a process that becomes `argv` and dies with its parent."""
        account = "-" if self.account is None else f"{self.account.uid}:{self.account.gid}"
        head = [
            sys.executable,
            "-I",
            "-S",
            _DEATHBOUND,
            str(os.getpid()),
            str(int(self.death_signal)),
            account,
        ]
        return [*head, *self.argv]


class Child:
    """A started `Command`. Its process id is the program's own: the wrapper execs."""

    def __init__(self, command: Command, *, output: int | None = None) -> None:
        """Start it. Its stdout and stderr go to the descriptor `output`, or to nowhere."""
        self.command = command
        sink = subprocess.DEVNULL if output is None else output
        # A session of its own keeps a terminal's Ctrl-C from children: only the supervisor decides the order.
        self._process = subprocess.Popen(
            command.wrapped(),
            env=None if command.env is None else dict(command.env),
            cwd=command.cwd,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
            pass_fds=command.pass_fds,
        )
        self.started_at_s = time.monotonic()

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_status(self) -> int | None:
        """None while it runs; else its exit status, negative for a signal. Never blocks."""
        return self._process.poll()

    def send(self, number: signal.Signals) -> None:
        """Send a signal; a child that has ended is left alone."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the end; None where it still runs after `timeout_s`."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self, grace_s: float) -> int:
        """Ask it to stop, kill it after `grace_s`; returns its exit status."""
        self.send(self.command.stop_signal)
        status = self.wait(grace_s)
        if status is None:
            self.kill()
            status = self._process.wait()
        return status

    def kill(self) -> None:
        """End it now, without a chance to tidy."""
        self.send(signal.SIGKILL)


def describe_status(status: int) -> str:
    """`exit status 3` or `signal SIGKILL`."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"
