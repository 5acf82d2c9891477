"""The supervisor: one readable log, restarts, the order of the end, and nothing left when it is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from waiting import alive, wait_until

from medley.local.lines import LineLog, LineReader

_SUPERVISOR = """
import json, sys
from pathlib import Path
from medley.local.child import Command
from medley.local.lines import LineLog
from medley.local.supervisor import ChildFailed, Stopped, Supervisor, Unit

folder = Path(sys.argv[1])

def unit(name, code, stage=0, grace_s=60.0):
    return Unit(name, lambda: Command(name=name, argv=(sys.executable, "-uc", code)), stage, grace_s)

def write(pids):
    (folder / "pids.new").write_text(json.dumps(pids))
    (folder / "pids.new").rename(folder / "pids")

LOOP = '''
import signal, sys, time, subprocess
def stop(*_):
    print("stopping")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("hello")
while True: signal.pause()
'''
DEAF = LOOP.replace('print("stopping")', 'return print("ignored")').replace("sys.exit(0)", "")
FAILS = "import sys; print('the reason'); sys.exit(3)"

try:
    with Supervisor(LineLog(), on_change=write) as supervisor:
        if sys.argv[2] == "once":
            supervisor.run_once(unit("migrate", FAILS))
        supervisor.keep(unit("first", LOOP, 0))
        supervisor.keep(unit("second", LOOP if sys.argv[2] == "loop" else DEAF, 1))
        supervisor.watch()
except ChildFailed as error:
    print("failed:", error)
    sys.exit(1)
"""


class _Run:
    """A supervisor in a process of its own; its log goes to a file."""

    def __init__(self, folder: Path, mode: str) -> None:
        self._log_path = folder / "log"
        self._pids_path = folder / "pids"
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-uc", _SUPERVISOR, str(folder), mode], stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    def pids(self) -> dict[str, int]:
        return dict(json.loads(self._pids_path.read_text())) if self._pids_path.exists() else {}

    def wait_for_log(self, text: str, times: int = 1) -> None:
        wait_until(lambda: self.log.count(text) >= times, f"{text!r} in the log:\n{self.log}")


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[[str], _Run]]:
    runs: list[_Run] = []

    def start(mode: str) -> _Run:
        runs.append(_Run(tmp_path, mode))
        return runs[-1]

    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()


def test_a_crashed_child_is_started_again_and_the_log_says_how_it_ended(
    supervise: Callable[[str], _Run],
) -> None:
    run = supervise("loop")
    run.wait_for_log("hello", 2)
    before = run.pids()
    os.kill(before["second"], signal.SIGKILL)
    run.wait_for_log("hello", 3)
    wait_until(lambda: "second" in run.pids(), "the new process id")
    assert run.pids()["second"] != before["second"]
    assert run.pids()["first"] == before["first"]
    assert "second ended with signal SIGKILL" in run.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_children_stage_by_stage(supervise: Callable[[str], _Run], number: signal.Signals) -> None:
    run = supervise("loop")
    run.wait_for_log("hello", 2)
    run.process.send_signal(number)
    assert run.process.wait(15) == 0
    stops = [line.split()[0] for line in run.log.splitlines() if "| stopping" in line]
    assert stops == ["first", "second"]
    assert number.name in run.log


def test_a_second_signal_kills_what_does_not_stop(supervise: Callable[[str], _Run]) -> None:
    run = supervise("deaf")
    run.wait_for_log("hello", 2)
    run.process.send_signal(signal.SIGTERM)
    run.wait_for_log("ignored")
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(30) == 0
    assert "second has not stopped: killing it" in run.log


def test_a_killed_supervisor_leaves_no_child(supervise: Callable[[str], _Run]) -> None:
    run = supervise("deaf")
    run.wait_for_log("hello", 2)
    children = [psutil.Process(pid) for pid in run.pids().values()]
    run.process.kill()
    run.process.wait()
    wait_until(lambda: not alive(children), "the end of all")


def test_a_failed_first_step_ends_the_run_and_its_own_words_are_in_the_log(
    supervise: Callable[[str], _Run],
) -> None:
    run = supervise("once")
    assert run.process.wait(15) == 1
    assert "migrate    | the reason" in run.log
    assert "migrate ended with exit status 3" in run.log


def test_lines_of_children_never_mix_and_an_unfinished_one_is_not_lost() -> None:
    stream = io.StringIO()
    log = LineLog(stream, name_width=3)
    pipes = [os.pipe(), os.pipe()]
    readers = [LineReader("a", log), LineReader("b", log)]
    for text in (b"one ", b"two\nthr", b"ee"):
        for (_, write_end), (read_end, _), reader in zip(pipes, pipes, readers, strict=True):
            os.write(write_end, text)
            assert reader.read_from(read_end)
    for (read_end, write_end), reader in zip(pipes, readers, strict=True):
        os.close(write_end)
        assert not reader.read_from(read_end)
        os.close(read_end)
    assert stream.getvalue() == "a   | one two\nb   | one two\na   | three\nb   | three\n"
