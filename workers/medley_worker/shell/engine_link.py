"""One engine process and the socket to it: start, frames in both directions, end.

Owns the process and the descriptor. Knows messages, not what they mean for jobs.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import structlog

from medley.config import inherited_env
from medley.local.child import Child, Command, describe_status
from medley.spec.wire import (
    Add,
    EngineConfig,
    FrameReader,
    FromEngine,
    Shutdown,
    ToEngine,
    WorkItem,
    encode_frame,
    from_engine_decoder,
)

_RECEIVE_BYTES = 1 << 20
# One Add holds at most this many jobs and tokens, far below MAX_FRAME_BYTES.
_ADD_ITEMS = 256
_ADD_TOKENS = 1 << 20
_EXIT_S = 2.0  # from the end of what it says to the end of the process

log = structlog.get_logger()


class EngineLink:
    """A started engine.

    `on_messages` gets what the engine says, in order, in lists, on a thread of the link's own; `on_end` is called
    on that thread after the last message, when the process has ended.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_messages: Callable[[list[FromEngine]], None],
        on_end: Callable[[], None],
    ) -> None:
        """Start it. The process dies with the calling thread: that thread must live as long as the shell."""
        self._on_messages = on_messages
        self._on_end = on_end
        self._sending = threading.Lock()
        self._heard_at_s = time.monotonic()
        self._socket, theirs = socket.socketpair()
        argv = (sys.executable, "-m", "medley_worker.engine.process", "--fd", str(theirs.fileno()))
        try:
            # The engine needs no address of database, Redis or store.
            command = Command(name="engine", argv=argv, env=inherited_env(), pass_fds=(theirs.fileno(),))
            self._child = Child(command, output=sys.stdout.fileno())
        finally:
            theirs.close()
        self._send(_config_frame(config))
        self._has_ended = threading.Event()
        self._reader = threading.Thread(target=self._read, name="engine-link", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def silent_s(self) -> float:
        """Seconds since it last said anything."""
        return time.monotonic() - self._heard_at_s

    @property
    def has_ended(self) -> bool:
        """The process has ended and everything it said has been handed on."""
        return self._has_ended.is_set()

    def send(self, message: ToEngine) -> None:
        """Send one message; what is said to an engine that has gone is lost, as `on_end` will tell."""
        self._send(encode_frame(message))

    def add(self, items: Sequence[WorkItem]) -> None:
        """Send jobs, in as many messages as they need."""
        chunk: list[WorkItem] = []
        num_tokens = 0
        for item in items:
            item_tokens = _num_tokens(item)
            if chunk and (len(chunk) == _ADD_ITEMS or num_tokens + item_tokens > _ADD_TOKENS):
                self.send(Add(tuple(chunk)))
                chunk, num_tokens = [], 0
            chunk.append(item)
            num_tokens += item_tokens
        if chunk:
            self.send(Add(tuple(chunk)))

    def stop(self, grace_s: float) -> None:
        """Ask it to end, kill it after `grace_s`; returns when it has ended."""
        self.send(Shutdown())
        if not self._has_ended.wait(grace_s):
            self.kill()

    def kill(self) -> None:
        """End it now; returns when it has ended."""
        self._child.kill()
        self._has_ended.wait()

    def _send(self, frame: bytes) -> None:
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(frame)

    def _read(self) -> None:
        reader = FrameReader()
        try:
            while data := self._socket.recv(_RECEIVE_BYTES):
                self._heard_at_s = time.monotonic()
                bodies = reader.feed(data)
                if bodies:
                    self._on_messages([from_engine_decoder.decode(body) for body in bodies])
        except OSError:
            pass  # a reset is an end like any other
        except (ValueError, msgspec.DecodeError) as error:
            log.error("engine.unreadable", pid=self.pid, reason=str(error))
        # Nothing can be said to an engine that says nothing any more.
        if self._child.wait(_EXIT_S) is None:
            self._child.kill()
        status = self._child.wait(_EXIT_S)
        self._socket.close()
        log.info("engine.ended", pid=self.pid, status=None if status is None else describe_status(status))
        self._has_ended.set()
        self._on_end()


def _num_tokens(item: WorkItem) -> int:
    # A kept token brings its log-probability: together they take as much room as three tokens.
    return len(item.prompt_token_ids) + (3 * len(item.checkpoint.token_ids) if item.checkpoint else 0)


def _config_frame(config: EngineConfig) -> bytes:
    body = msgspec.msgpack.encode(config)
    return struct.pack("<I", len(body)) + body
