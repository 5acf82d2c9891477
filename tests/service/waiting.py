"""Waiting for what other threads and processes do: polled, with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import psutil


def wait_until(holds: Callable[[], object], what: str = "what was awaited", timeout_s: float = 30.0) -> None:
    """Polls until `holds`; fails at the deadline, naming `what`."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; one that has ended and was not waited for does not."""
    return [process for process in processes if _is_alive(process)]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two looks
        return False
