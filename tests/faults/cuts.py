"""A network that a test can cut: what passes between one process and a server's Unix socket.

Bytes are passed on, withheld while both ends think that they are connected (stalled), or connections are ended and
new ones refused (cut).
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path


class Way(Enum):
    OPEN = auto()
    STALLED = auto()
    CUT = auto()


class Cut:
    """Listens at `here` and passes on to `there`, on threads, until it is closed."""

    def __init__(self, here: Path, there: Path) -> None:
        self._there = there
        self._way = Way.OPEN
        self._changed = threading.Condition()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(here))
        self._listener.listen(64)
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def set(self, way: Way) -> None:
        with self._changed:
            self._way = way
            if way is Way.CUT:
                for pair in self._pairs:
                    _end(pair)
                self._pairs.clear()
            self._changed.notify_all()

    def close(self) -> None:
        self.set(Way.CUT)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=10)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            try:
                if self._way is Way.CUT:
                    raise ConnectionRefusedError
                far.connect(str(self._there))
            except OSError:
                near.close()
                far.close()
                continue
            with self._changed:
                self._pairs.append((near, far))
            self._start(lambda near=near, far=far: self._pass_on(near, far))

    def _pass_on(self, near: socket.socket, far: socket.socket) -> None:
        """Both ways, until either end is closed or the network is cut."""
        with near, far, contextlib.suppress(OSError):
            while True:
                readable, _, _ = select.select([near, far], [], [])
                with self._changed:
                    self._changed.wait_for(lambda: self._way is not Way.STALLED)
                for source in readable:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    (far if source is near else near).sendall(data)

    def _start(self, run: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()


def _end(pair: tuple[socket.socket, socket.socket]) -> None:
    for end in pair:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
