"""One engine from its start to its end: loading, awake, asleep, and how it gets from one to the other.

Owns its process and where that stands. Knows no jobs and not what the worker is to be: it is told to sleep and to wake.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum, auto

import structlog

from medley.spec.wire import Asleep, Awake, EngineConfig, FromEngine, Ready, Sleep, Wake
from medley_worker.shell.engine_link import EngineLink

SLEEP_S = 60.0  # for the engine to give its memory back, which copies the weights the first time, or to have it again
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


class EngineLife:
    """Starts an engine. on_messages: all that it says, on the link's thread. on_change: called where it may have work
    for whoever looks at how things stand: it is loaded, awake, or has ended. stall_s: a loaded engine speaks each
    second, and between steps; one that is silent for longer is taken for dead.
    """

    def __init__(
        self,
        config: EngineConfig,
        on_messages: Callable[[list[FromEngine]], None],
        on_change: Callable[[], None],
        stall_s: float,
    ) -> None:
        self.phase = EnginePhase.LOADING
        self._stall_s = stall_s
        self.ready: Ready | None = None  # once it is loaded
        self._on_messages, self._on_change = on_messages, on_change
        self._fell_asleep = threading.Event()
        self.link = EngineLink(config, on_messages=self._hear, on_end=on_change)
        log.info("engine.started", pid=self.link.pid)

    @property
    def has_ended(self) -> bool:
        return self.link.has_ended

    @property
    def can_sleep(self) -> bool:
        """Whether it is loaded, and has a way to sleep."""
        return self.ready is not None and self.ready.can_sleep

    def kill_if_stalled(self) -> None:
        """End it if it has been silent for longer than it ever is where it stands."""
        if not self.has_ended and self.link.silent_s > _STALLS_S.get(self.phase, self._stall_s):
            log.error("engine.stalled", pid=self.link.pid, silent_s=round(self.link.silent_s), phase=self.phase.name)
            self.link.kill()

    def sleep(self, is_called_off: Callable[[], bool]) -> bool:
        """Have it give the device's memory back; it holds no jobs. Returns when it has, whether it has.

        Not so where it ended, took too long, or the wait was called off.
        """
        self.phase = EnginePhase.FALLING_ASLEEP
        self._fell_asleep.clear()
        self.link.send(Sleep())
        deadline = time.monotonic() + SLEEP_S
        while not self._fell_asleep.wait(0.05):
            if self.has_ended or is_called_off() or time.monotonic() > deadline:
                return False
        return True

    def wake(self) -> None:
        """Tell one that is asleep to wake; `phase` says when it has. Others are left as they are."""
        if self.phase is EnginePhase.ASLEEP:
            self.phase = EnginePhase.WAKING
            self.link.send(Wake())

    def _hear(self, messages: list[FromEngine]) -> None:
        # First, so that whoever sees the new phase reports what was said with it.
        self._on_messages(messages)
        for message in messages:
            if isinstance(message, Ready):
                self.ready, self.phase = message, EnginePhase.AWAKE
                log.info("engine.loaded", load_s=round(message.load_s, 2))
            elif isinstance(message, Asleep):
                self.phase = EnginePhase.ASLEEP
                self._fell_asleep.set()
                log.info("engine.asleep", sleep_s=round(message.sleep_s, 2), device_mib=message.device_bytes >> 20)
            elif isinstance(message, Awake) and self.phase is EnginePhase.WAKING:  # else it was told to sleep since
                self.phase = EnginePhase.AWAKE
                log.info("engine.awake", wake_s=round(message.wake_s, 2))
        if any(isinstance(message, Ready | Awake) for message in messages):
            self._on_change()
