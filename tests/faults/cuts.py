"""A network that a test can cut: what passes between one process and a server's Unix socket.

Bytes are passed on, withheld while both ends think that they are connected (stalled), or connections are ended and
new ones refused (cut).
"""

from __future__ import annotations

import contextlib
import socket
import threading
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
        threading.Thread(target=self._accept, daemon=True).start()

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
            pair = (near, far)
            with self._changed:
                self._pairs.append(pair)
            for source, sink in (pair, pair[::-1]):
                threading.Thread(target=self._pass_on, args=(pair, source, sink), daemon=True).start()

    def _pass_on(self, pair: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                with self._changed:
                    self._changed.wait_for(lambda: self._way is not Way.STALLED)
                sink.sendall(data)
        except OSError:
            pass
        _end(pair)


def _end(pair: tuple[socket.socket, socket.socket]) -> None:
    for end in pair:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
