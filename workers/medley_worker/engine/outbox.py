"""The engine's way out: frames to the shell, in order, without waiting for it while the backlog is small.

Owns the writing side of the socket. Knows bytes, not messages.
"""

from __future__ import annotations

import socket
import threading
from collections import deque

MAX_BACKLOG_BYTES = 16 << 20  # a shell this far behind makes the engine wait


class Outbox:
    """Frames on their way to `connection`.

    `put` sends at once what the socket takes and leaves the rest to a writer thread; it waits only while more
    than `max_backlog_bytes` are unsent. After the peer has gone, frames are dropped: the reader of the same
    socket sees its end and stops the process.
    """

    def __init__(self, connection: socket.socket, *, max_backlog_bytes: int = MAX_BACKLOG_BYTES) -> None:
        self._connection = connection
        self._max_backlog_bytes = max_backlog_bytes
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._is_broken = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._writer = threading.Thread(target=self._write, name="outbox", daemon=True)
        self._writer.start()

    def put(self, frames: bytes) -> None:
        """Send `frames` after all earlier ones."""
        with self._changed:
            # What the writer is sending still counts, so an empty backlog means that nobody sends.
            if self._backlog_bytes == 0 and not self._is_broken:
                frames = frames[self._send_now(frames) :]
            while self._backlog_bytes > self._max_backlog_bytes and not self._is_broken:
                self._changed.wait()
            if frames and not self._is_broken:
                self._backlog.append(frames)
                self._backlog_bytes += len(frames)
                self._changed.notify_all()

    def flush(self) -> None:
        """Return when everything put before is in the socket, or the peer has gone."""
        with self._changed:
            while self._backlog_bytes and not self._is_broken:
                self._changed.wait()

    def close(self) -> None:
        """Flush and end the writer thread; the socket stays open."""
        self.flush()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._writer.join()

    def _send_now(self, frames: bytes) -> int:
        """How many bytes the socket took without waiting."""
        try:
            return self._connection.send(frames, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            self._is_broken = True
            return 0

    def _write(self) -> None:
        while True:
            with self._changed:
                while not self._backlog and not self._is_closed:
                    self._changed.wait()
                if not self._backlog:
                    return
                frames = b"".join(self._backlog)
                self._backlog.clear()
            is_broken = False
            try:
                self._connection.sendall(frames)
            except OSError:
                is_broken = True
            with self._changed:
                self._is_broken |= is_broken
                self._backlog_bytes -= len(frames)
                self._changed.notify_all()
