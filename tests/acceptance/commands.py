"""`medley` as its users run it: within this process where only words matter, as a process with pipes, in a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import msgspec
from click.testing import CliRunner

from medley.cli import main

TIMEOUT_S = 60


@dataclass(frozen=True)
class Done:
    """What a command has printed, and its exit status."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Medley:
    """The command line of one tenant. None: its variable is not set."""

    url: str | None
    api_key: str | None

    def __call__(self, *args: str | Path) -> Done:
        """Runs `medley ARGS` in this process."""
        env = {"MEDLEY_URL": self.url, "MEDLEY_API_KEY": self.api_key}
        done = CliRunner().invoke(main, [str(arg) for arg in args], env=env, prog_name="medley")
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        return Done(done.exit_code, done.stdout, done.stderr)

    def process(self, *args: str | Path) -> Done:
        """Runs `medley ARGS` as a process with pipes."""
        command = [sys.executable, "-m", "medley", *map(str, args)]
        done = subprocess.run(command, env=self.environ(), capture_output=True, text=True, timeout=TIMEOUT_S)
        return Done(done.returncode, done.stdout, done.stderr)

    def lines(self, *args: str | Path) -> list[str]:
        """The lines that a run prints which must be well and say nothing on standard error."""
        done = self(*args)
        assert (done.returncode, done.stderr) == (0, ""), done
        return done.stdout.splitlines()

    def json(self, *args: str | Path) -> list[object]:
        """The values that `medley ARGS --json` prints."""
        done = self(*args, "--json")
        assert done.returncode == 0, done
        return [msgspec.json.decode(line) for line in done.stdout.splitlines()]

    def in_terminal(self, *args: str | Path) -> tuple[int, str]:
        """Runs `medley ARGS` in a terminal of its own. Returns its exit status and all that was written there."""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        command = [sys.executable, "-m", "medley", *map(str, args)]
        with subprocess.Popen(command, env=self.environ(), stdin=slave, stdout=slave, stderr=slave) as process:
            os.close(slave)
            written = bytearray()
            while chunk := _read(master):
                written += chunk
        os.close(master)
        return process.returncode, written.decode()

    def environ(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
        given = {"MEDLEY_URL": self.url, "MEDLEY_API_KEY": self.api_key}
        return {**kept, "TERM": "xterm-256color", **{k: v for k, v in given.items() if v is not None}}


def _read(master: int) -> bytes:
    try:
        return os.read(master, 1 << 16)
    except OSError:  # the last process that held the terminal has gone
        return b""
