"""A following rank's process: `python -m medley_worker.engine.parallel.process --fd N`, a loop around one Follower.

It dies with rank 0, whatever either of them is doing: by the end of the socket and by the parent's death.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback

import torch

from medley.spec.wire import FrameReader
from medley_worker.engine.parallel.follower import Follower
from medley_worker.engine.parallel.messages import (
    Alive,
    Build,
    Drop,
    Failed,
    Fetch,
    FromRank,
    Line,
    Loaded,
    Met,
    Pass,
    Place,
    Sleep,
    Start,
    Stop,
    ToRank,
    Unfetch,
    Vacate,
    Wake,
    encode,
    to_rank_decoder,
)
from medley_worker.engine.sizing import cpu_threads
from medley_worker.parents import die_with_parent

_RECEIVE_BYTES = 1 << 20
_UNBUILDABLE, _CRASHED = 2, 1
_ALIVE_S = 1.0


class RankLoop:
    """Three threads: one reads, and fetches adapters as soon as it is asked; one says that the process lives; this one
    does all else in order.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._follower: Follower | None = None
        threading.Thread(target=self._read, name="inbox", daemon=True).start()
        threading.Thread(target=self._beat, name="alive", daemon=True).start()

    def run(self) -> int:
        """Follow until Stop. The exit status."""
        start = self._inbox.get()
        assert isinstance(start, Start), "the first frame says who this is"
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, cpu_threads() // start.config.tensor_parallel))
        try:
            follower = Follower(start)
            self._send(Loaded())
            self._send(Met(follower.meet()))
            build = self._inbox.get()
            if isinstance(build, Stop):
                return 0
            assert isinstance(build, Build), "sizes come before work"
            built = follower.build(build.sizes, build.host_bytes)
        except (ValueError, OSError, RuntimeError) as error:
            self._send(Failed(f"{type(error).__name__}: {error}"))
            return _UNBUILDABLE
        self._follower = follower
        self._send(built)
        self._follow(follower)
        return 0

    def _follow(self, follower: Follower) -> None:
        while True:
            match self._inbox.get():
                case Pass() as message:
                    follower.run(message)
                case Place() as message:
                    follower.place(message)
                case Vacate() as message:
                    follower.vacate(message)
                case Drop() as message:
                    follower.drop(message)
                case Unfetch(number=number):
                    follower.unfetch(number)
                case Sleep():
                    self._send(follower.sleep())
                case Wake():
                    self._send(follower.wake())
                case Stop():
                    return
                case message:
                    raise AssertionError(f"{type(message).__name__} is not for a rank that is built")

    def _send(self, message: FromRank) -> None:
        with self._sending:
            self._connection.sendall(encode(message))

    def _beat(self) -> None:
        with contextlib.suppress(OSError):  # the reading thread ends the process
            while True:
                self._send(Alive())
                time.sleep(_ALIVE_S)

    def _read(self) -> None:
        """End the process when rank 0 has gone: this rank may wait for it in a collective."""
        reader = FrameReader()
        try:
            while data := self._connection.recv(_RECEIVE_BYTES):
                for body in reader.feed(data):
                    self._take(to_rank_decoder.decode(body))
        except Exception:
            traceback.print_exc()
            os._exit(_CRASHED)
        os._exit(0)

    def _take(self, message: ToRank) -> None:
        follower = self._follower
        match message:
            case Fetch():
                assert follower is not None, "adapters come to a rank that is built"
                self._send(follower.fetch(message))
            case Line():
                assert follower is not None, "adapters come to a rank that is built"
                follower.set_line(message)
            case _:
                self._inbox.put(message)


def main() -> int:
    """Serve the socket `--fd` until Stop or its end. Exit status 2: this rank could not be built."""
    parser = argparse.ArgumentParser(prog="medley_worker.engine.parallel.process")
    parser.add_argument("--fd", type=int, required=True, help="an open socket to rank 0")
    arguments = parser.parse_args()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides how to end
    return RankLoop(socket.socket(fileno=arguments.fd)).run()


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = _CRASHED
    sys.stderr.flush()
    # Not by the interpreter's way: NCCL would wait for graphs, and for ranks that are gone.
    os._exit(status)
