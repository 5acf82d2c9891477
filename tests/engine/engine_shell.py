"""An engine as a process at the end of a socketpair, and the shell's end of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import msgspec

from medley.spec.jobs import Checkpoint
from medley.spec.sampling import SamplingParams
from medley.spec.wire import (
    AdapterRef,
    EngineConfig,
    Finished,
    FrameReader,
    FromEngine,
    JobKey,
    Ready,
    ToEngine,
    WorkItem,
    encode_frame,
    from_engine_decoder,
)

START_S = 60.0  # importing torch on a busy machine


class Shell:
    """The other end: starts an engine process, talks to it, keeps what it said."""

    def __init__(self, config: EngineConfig, failpoint: str | None = None) -> None:
        self.connection, theirs = socket.socketpair()
        environment = dict(os.environ, OMP_NUM_THREADS="1")
        if failpoint is not None:
            environment["MEDLEY_ENGINE_FAILPOINT"] = failpoint
        self.process = subprocess.Popen(
            [sys.executable, "-m", "medley_worker.engine.process", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=environment,
        )
        theirs.close()
        self.reader = FrameReader()
        self.said: list[FromEngine] = []
        body = msgspec.msgpack.encode(config)
        self.connection.sendall(len(body).to_bytes(4, "little") + body)

    def send(self, message: ToEngine) -> None:
        self.connection.sendall(encode_frame(message))

    def listen(self, until: Callable[[list[FromEngine]], bool], timeout_s: float = START_S) -> list[FromEngine]:
        """Read until `until(said)` holds; fails at the deadline or when the engine has gone before."""
        deadline = time.monotonic() + timeout_s
        while not until(self.said):
            self.connection.settimeout(max(0.01, deadline - time.monotonic()))
            data = self.connection.recv(1 << 20)
            assert data, f"the engine ended; it had said {self.said}"
            self.said += [from_engine_decoder.decode(body) for body in self.reader.feed(data)]
        return self.said

    def listen_to_end(self) -> list[FromEngine]:
        self.connection.settimeout(START_S)
        while data := self.connection.recv(1 << 20):
            self.said += [from_engine_decoder.decode(body) for body in self.reader.feed(data)]
        return self.said

    def finished(self) -> dict[JobKey, Finished]:
        return {m.key: m for m in self.said if isinstance(m, Finished)}

    def close(self) -> None:
        self.connection.close()
        self.process.wait(timeout=START_S)


def has(kind: type[FromEngine], count: int = 1) -> Callable[[list[FromEngine]], bool]:
    return lambda said: sum(isinstance(m, kind) for m in said) >= count


def item(
    prompt: tuple[int, ...] = (5, 6, 7),
    *,
    max_tokens: int = 4,
    adapter: AdapterRef | None = None,
    checkpoint: Checkpoint | None = None,
    want_progress: bool = False,
) -> WorkItem:
    return WorkItem(
        key=JobKey(uuid4(), 1),
        prompt_token_ids=prompt,
        adapter=adapter,
        sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1),
        checkpoint=checkpoint,
        want_progress=want_progress,
    )


def launch(model_dir: Path, failpoint: str | None = None, **config: object) -> Shell:
    fields: dict[str, object] = {"model_dir": str(model_dir), "max_num_seqs": 4, "max_model_len": 128}
    shell = Shell(msgspec.convert(fields | config, EngineConfig), failpoint)
    shell.listen(has(Ready))
    return shell
