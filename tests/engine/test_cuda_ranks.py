"""The passes of a rank that follows, as CUDA runs them: two ranks on threads, against one rank a step at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from cuda_stand_ins import cuda_forward
from test_cuda_forward import MAX_TOKENS, mixed_requests
from torch import Tensor

from medley.spec.wire import EngineConfig
from medley_worker import Completion, Engine, Request
from medley_worker.engine import assembly
from medley_worker.engine.parallel import follower as follower_module
from medley_worker.engine.parallel.follower import Follower
from medley_worker.engine.parallel.followers import Followers
from medley_worker.engine.parallel.messages import (
    Build,
    Built,
    Drop,
    Fetch,
    FromRank,
    Loaded,
    Met,
    Pass,
    Place,
    Start,
    Stop,
    ToRank,
    Unfetch,
    Vacate,
    encode,
    to_rank_decoder,
)

WAIT_S = 60.0


class ThreadGroup:
    """`Collectives` of two threads."""

    meeting = threading.Barrier(2)
    given: list[Tensor | None] = [None, None]  # noqa: RUF012 - what the threads share

    def __init__(self, meeting: Path, rank: int, size: int, device: torch.device) -> None:
        del meeting, device
        assert size == 2
        self._rank = rank

    def add(self, x: Tensor) -> None:
        self._exchange(x, lambda one, two: one + two)

    def spread(self, x: Tensor) -> None:
        self._exchange(x, lambda one, _: one.clone())

    def _exchange(self, x: Tensor, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.given[self._rank] = x
        self.meeting.wait(WAIT_S)
        one, two = self.given
        assert one is not None
        assert two is not None
        assert one.shape == two.shape
        result = join(one, two)
        self.meeting.wait(WAIT_S)
        x.copy_(result)

    def abort(self) -> None:
        self.meeting.abort()

    def close(self) -> None: ...


class ThreadFollowers(Followers):
    """One Follower on a thread; messages go through their encoding."""

    def __init__(self, config: EngineConfig, on_death: object = None) -> None:
        del on_death
        self.meeting = Path("nowhere")
        self.death = None
        self._line = ()
        self._ranks = [SimpleNamespace(rank=1)]  # type: ignore[list-item]
        self._device_bytes = {}
        self._inbox: queue.SimpleQueue[ToRank] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[FromRank | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(Start(config, 1, "nowhere"),), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._send(Stop())
        self._thread.join(WAIT_S)

    def _send(self, message: ToRank) -> None:
        self._inbox.put(to_rank_decoder.decode(encode(message)[4:]))

    def _expect(self, kind: Any) -> list[Any]:
        answer = self._answers.get(timeout=WAIT_S)
        if isinstance(answer, BaseException):
            raise answer
        assert isinstance(answer, kind)
        return [answer]

    def _run(self, start: Start) -> None:
        try:
            follower = Follower(start)
            self._answers.put(Loaded())
            self._answers.put(Met(follower.meet()))
            while not isinstance(message := self._inbox.get(), Stop):
                self._take(follower, message)
        except BaseException as error:
            self._answers.put(error)
            ThreadGroup.meeting.abort()
            raise

    def _take(self, follower: Follower, message: ToRank) -> None:
        match message:
            case Build(sizes=sizes, host_bytes=host_bytes):
                follower.build(sizes, host_bytes)
                self._answers.put(Built(can_sleep=False, device_bytes=0))
            case Fetch():
                self._answers.put(follower.fetch(message))
            case Pass():
                follower.run(message)
            case Place():
                follower.place(message)
            case Vacate():
                follower.vacate(message)
            case Drop():
                follower.drop(message)
            case Unfetch(number=number):
                follower.unfetch(number)


def run(model_dir: Path, adapters: dict[str, Path], requests: list[Request], num_ranks: int) -> list[Completion]:
    engine = Engine.load(
        model_dir,
        max_num_seqs=7,
        max_model_len=96,
        max_num_batched_tokens=MAX_TOKENS,
        adapter_slots=1,
        tensor_parallel=num_ranks,
    )
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    completions = engine.generate(requests)
    engine.check_integrity()
    engine.close()
    return completions


@pytest.mark.parametrize(("kind", "is_invariant"), [("mistral", False), ("qwen3", False), ("llama3", True)])
def test_two_ranks_a_step_ahead_say_what_one_says_a_step_at_a_time(
    kind: str, is_invariant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = tiny.make_model(kind, tmp_path / "model")
    adapters = tiny.make_adapters(model_dir, tmp_path)
    requests = mixed_requests(list(adapters))
    expected = run(model_dir, adapters, requests, 1)
    monkeypatch.setattr(ThreadGroup, "meeting", threading.Barrier(2))
    with cuda_forward(monkeypatch, MAX_TOKENS, is_invariant) as build:
        monkeypatch.setattr(assembly, "ModelForward", build)
        monkeypatch.setattr(assembly, "Followers", ThreadFollowers)
        monkeypatch.setattr(assembly, "RankGroup", ThreadGroup)
        monkeypatch.setattr(follower_module, "RankGroup", ThreadGroup)
        found = run(model_dir, adapters, requests, 2)
    for one, two in zip(expected, found, strict=True):
        assert two.error is None
        assert one.token_ids == two.token_ids
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(two.logprobs), rtol=0, atol=1e-4)
