"""The other ranks as rank 0 sees them: started, told what to do, and noticed when they die.

Owns their processes and the sockets to them. A rank that dies ends the engine: the others wait for it in a
collective, which nothing else would end. Knows messages; no tensors and no requests.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from medley.spec.wire import EngineConfig, FrameReader
from medley_worker.engine.parallel.messages import (
    Alive,
    Build,
    Built,
    Drop,
    Failed,
    Fetch,
    Fetched,
    FromRank,
    Line,
    Loaded,
    Met,
    Pass,
    Place,
    Sleep,
    Slept,
    Start,
    Stop,
    ToRank,
    Unfetch,
    Vacate,
    Wake,
    Woken,
    encode,
    from_rank_decoder,
)
from medley_worker.engine.sizing import DeviceMemory, EngineSizes
from medley_worker.ops.collectives import RankGroup

PROCESS = "medley_worker.engine.parallel.process"  # the module that a rank's process runs
STOP_S = 5.0  # for a rank to end by itself
_RECEIVE_BYTES = 1 << 16
_SEND_BUFFER_BYTES = 4 << 20  # a pass of many rows and pages does not wait for its reader
_EXIT_S = 2.0  # from a rank's last word to its end
_DEATH_S = 15.0  # for a rank's thread to say that it died, after a collective has failed of it
# A rank says something each second once it has imported all it needs. One that is frozen says nothing more.
START_S = 600.0
BEAT_S, MAX_MISSED = 10.0, 6  # in pieces, since a machine that stood still as a whole is no frozen rank

Reply = TypeVar("Reply", bound=FromRank)


class RankDied(RuntimeError):
    """A rank of the engine has ended; the engine is of no more use."""


class _Rank:
    """One other rank's process. replies: what it says, None at its end."""

    def __init__(self, start: Start, on_end: Callable[[int, str], None]) -> None:
        self.rank = start.rank
        self.replies: queue.SimpleQueue[FromRank | None] = queue.SimpleQueue()
        self.has_ended = threading.Event()
        self.reason: str | None = None  # why it ended
        self._on_end = on_end
        self._socket, theirs = socket.socketpair()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_started = threading.Event()
        # The process dies with the thread that starts it, so that thread stays with it to its end.
        name = f"rank-{self.rank}"
        threading.Thread(target=self._live, args=(theirs,), name=name, daemon=True).start()
        self._is_started.wait()
        self.send(start)

    def send(self, message: ToRank) -> None:
        """What is said to a rank that has gone is lost, as its end will tell."""
        with contextlib.suppress(OSError):
            self._socket.sendall(encode(message))

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _live(self, theirs: socket.socket) -> None:
        argv = [sys.executable, "-m", PROCESS, "--fd", str(theirs.fileno())]
        try:
            with theirs:
                self._process = subprocess.Popen(argv, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL)
        except OSError as error:
            self.reason = f"rank {self.rank} could not be started: {error}"
        self._is_started.set()
        how = "was not started"
        if self._process is not None:
            self._read()
            how = _end_of(self._process)
        self._socket.close()
        self.reason = self.reason or f"rank {self.rank} {how}"
        self.has_ended.set()
        self.replies.put(None)
        self._on_end(self.rank, self.reason)

    def _read(self) -> None:
        reader = FrameReader()
        has_spoken = False
        with contextlib.suppress(OSError, ValueError, msgspec.DecodeError):
            while self._is_heard(has_spoken) and (data := self._socket.recv(_RECEIVE_BYTES)):
                has_spoken = True
                for body in reader.feed(data):
                    reply = from_rank_decoder.decode(body)
                    if isinstance(reply, Alive):
                        continue
                    if isinstance(reply, Failed):
                        self.reason = f"rank {self.rank}: {reply.reason}"
                    self.replies.put(reply)

    def _is_heard(self, has_spoken: bool) -> bool:
        """Wait until there is something to read, its end too; not for ever."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        timeouts = [BEAT_S] * MAX_MISSED if has_spoken else [START_S]
        if any(poll.poll(timeout * 1e3) for timeout in timeouts):
            return True
        self.reason = f"rank {self.rank} said nothing for {sum(timeouts):g} s"
        self.kill()
        return False


def _end_of(process: subprocess.Popen[bytes]) -> str:
    """How it ended; nothing can be said to a rank that says nothing any more."""
    try:
        status = process.wait(_EXIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            status = process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return "does not end"
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


class Followers:
    """Ranks 1 to N-1 of an engine. `adapters.OtherRanks`, for rank 0's decisions on adapters.

    on_death: called with the reason when a rank ends unasked, once the engine runs; on a thread of its own. By default
    the engine's owner gets RankDied.
    """

    def __init__(self, config: EngineConfig, on_death: Callable[[str], None] | None = None) -> None:
        self._on_death = on_death
        self._folder = Path(tempfile.mkdtemp(prefix="medley-ranks-"))  # 0700
        self.meeting = self._folder / "meeting"
        self.death: str | None = None
        self._is_closing = self._runs = False
        self._group: RankGroup | None = None
        self._failures: dict[int, str] = {}
        self._line: Sequence[tuple[int, Path]] = ()
        self._device_bytes: dict[int, int] = {}
        self.can_sleep = False  # once they are built
        atexit.register(self.close)
        self._ranks = [
            _Rank(Start(config, rank, str(self.meeting)), self._ended) for rank in range(1, config.tensor_parallel)
        ]

    def await_loaded(self) -> None:
        """Every rank has its weights. Raises ValueError for one that could not be built, RankDied."""
        self._expect(Loaded)
        self._runs = True

    def await_met(self, group: RankGroup) -> list[DeviceMemory]:
        """The memory of the other ranks' devices, none for CPUs. group: rank 0's, which is let go of at a death."""
        self._group = group
        return [reply.memory for reply in self._expect(Met) if reply.memory is not None]

    def build(self, sizes: EngineSizes, host_bytes: int) -> None:
        """Every rank builds while rank 0 does: they compute together when they warm up. Arguments as of `Build`."""
        self._send(Build(sizes, host_bytes))

    def await_built(self) -> None:
        built = self._expect(Built)
        self.can_sleep = all(reply.can_sleep for reply in built)
        self._note_memory(built)

    @property
    def device_bytes(self) -> int:
        """Of the other ranks' devices, held by their processes when they last changed it; 0 on a CPU."""
        return sum(self._device_bytes.values())

    def sleep(self) -> str | None:
        """Have each give its memory back, one after another; or why one could not, and those after it were not asked.

        Those that sleep are left so. Raises RankDied.
        """
        for rank in self._ranks:
            rank.send(Sleep())
            reply = self._answer_of(rank, Slept)
            self._device_bytes[rank.rank] = reply.device_bytes
            if reply.error is not None:
                return reply.error
        return None

    def begin_wake(self) -> None:
        """Have all of them wake; `await_woken` is the answer."""
        self._send(Wake())

    def await_woken(self) -> str | None:
        """Wait until all are awake; or why one is not. Raises RankDied."""
        replies = self._expect(Woken)
        self._note_memory(replies)
        return next((reply.error for reply in replies if reply.error is not None), None)

    def run(
        self,
        num_decode_rows: int,
        num_new: npt.NDArray[np.int64],
        kv_len: npt.NDArray[np.int64],
        kv_indices: npt.NDArray[np.int32],
        load_ids: Sequence[int | None],
        *,
        begins_step: bool = True,
    ) -> None:
        """Run a pass, `messages.Pass`. Called before rank 0 launches anything of it that another rank waits for."""
        self._send(
            Pass(
                num_decode_rows=num_decode_rows,
                num_new=num_new.astype(np.int64, copy=False).tobytes(),
                kv_len=kv_len.astype(np.int64, copy=False).tobytes(),
                kv_indices=kv_indices.astype(np.int32, copy=False).tobytes(),
                load_ids=tuple(load_ids),
                begins_step=begins_step,
            )
        )

    def fetch(self, number: int, path: Path) -> None:
        self._send(Fetch(number, str(path)))

    def fetched(self, number: int) -> str | None:
        replies = self._expect(Fetched)
        assert all(reply.number == number for reply in replies), "fetches are answered one by one"
        return next((reply.error for reply in replies if reply.error is not None), None)

    def unfetch(self, number: int) -> None:
        self._send(Unfetch(number))

    def place(self, number: int, load_id: int, tiles: Sequence[int]) -> None:
        self._send(Place(number, load_id, tuple(tiles)))

    def release(self, number: int) -> None:
        self._send(Vacate(number))

    def drop(self, number: int) -> None:
        self._send(Drop(number))

    def set_line(self, line: Sequence[tuple[int, Path]]) -> None:
        if line != self._line:
            self._line = line
            self._send(Line(tuple((number, str(path)) for number, path in line)))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What goes wrong within, or is computed after a death, is a RankDied."""
        try:
            yield
        except RuntimeError as error:
            # A collective fails at once; who died is known when the dead one's thread has read so.
            if self._await_death():
                raise RankDied(self.death) from error
            raise
        if self.death is not None:
            raise RankDied(self.death)

    def close(self) -> None:
        """End the other ranks. May be called twice."""
        self._is_closing = True
        atexit.unregister(self.close)
        self._send(Stop())
        deadline = time.monotonic() + STOP_S
        for rank in self._ranks:
            if not rank.has_ended.wait(max(0.0, deadline - time.monotonic())):
                rank.kill()
                rank.has_ended.wait(STOP_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank. For tests."""
        return [rank._process.pid for rank in self._ranks if rank._process is not None]

    def _send(self, message: ToRank) -> None:
        for rank in self._ranks:
            rank.send(message)

    def _expect(self, kind: type[Reply]) -> list[Reply]:
        """The next reply of each rank."""
        return [self._answer_of(rank, kind) for rank in self._ranks]

    def _answer_of(self, rank: _Rank, kind: type[Reply]) -> Reply:
        reply = rank.replies.get()
        if reply is None or isinstance(reply, Failed):
            rank.replies.put(None)  # whoever asks again hears the same
            rank.has_ended.wait(STOP_S)
            reason = rank.reason or f"rank {rank.rank} is about to end; its last lines say why"
            raise RankDied(self.death or reason) if reply is None else ValueError(reason)
        assert isinstance(reply, kind), f"got {type(reply).__name__}, wanted {kind.__name__}"
        return reply

    def _note_memory(self, replies: Sequence[Built | Woken]) -> None:
        for rank, reply in zip(self._ranks, replies, strict=True):
            self._device_bytes[rank.rank] = reply.device_bytes

    def _ended(self, rank: int, reason: str) -> None:
        """On the rank's thread."""
        del rank
        if self._is_closing:
            return
        if self._runs and self._on_death is not None:
            self._on_death(reason)  # before a step can see of the death, and end the process in its own way
        self.death = self.death or reason
        # Else rank 0 waits for a reply, and raises.
        if self._runs and self._group is not None:
            self._group.abort()

    def _await_death(self) -> bool:
        deadline = time.monotonic() + _DEATH_S
        while self.death is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.death is not None


def rank_device(config: EngineConfig, rank: int) -> str:
    """The device of a rank: those after `config.device`, in order."""
    kind, _, index = config.device.partition(":")
    return kind if kind == "cpu" else f"{kind}:{int(index or 0) + rank}"


def end_process(reason: str) -> None:
    """`on_death` of an engine that is a process: its end is told by its socket, and the other ranks end with it."""
    sys.stderr.write(f"engine.rank_died {reason}\n")
    sys.stderr.flush()
    os._exit(137)
