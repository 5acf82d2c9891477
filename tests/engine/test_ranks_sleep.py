"""Ranks that sleep together: what they are after it, when they have woken, and what a rank's death or refusal does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import tiny
from engine_shell import Shell, has, item
from test_tensor_parallel import DEADLINE_S, _ranks_of, load, pids_of

from medley.spec.wire import Add, Asleep, Awake, EngineConfig, Finished, Ready, Sleep, Wake
from medley_worker import Engine, Request, SamplingParams
from medley_worker.engine.parallel.followers import RankDied
from medley_worker.engine.parallel.memory import RanksMemory

NUM_NEW = 12
STILL_S = 1.0  # in which a wake that does not wait would have ended many times


@pytest.fixture
def engine(tiny_model: Path, tiny_adapters: dict[str, Path]) -> Iterator[Engine]:
    engine = load(tiny_model, tiny_adapters, 2, sleeps=True)
    yield engine
    engine.close()


def outputs(engine: Engine, names: list[str | None]) -> list[tuple[list[int], list[float]]]:
    greedy = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)
    drawn = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True, temperature=1.0, seed=7)
    requests = [
        Request(tiny.prompt(3 + 5 * i % 17, seed=i), name, sampling)
        for i, name in enumerate(names)
        for sampling in (greedy, drawn)
    ]
    return [(completion.token_ids, completion.logprobs) for completion in engine.generate(requests)]


def test_results_are_the_same_before_and_after_any_number_of_sleeps(
    engine: Engine, tiny_adapters: dict[str, Path]
) -> None:
    names = [None, *tiny_adapters]
    before, ranks = outputs(engine, names), pids_of(engine)
    for _ in range(3):
        engine.sleep()
        engine.sleep()
        engine.check_integrity()
        assert engine.stats().tiles_used == 0
        engine.wake()
        engine.wake()
        assert outputs(engine, names) == before
        engine.check_integrity()
    assert pids_of(engine) == ranks


def test_each_rank_gives_its_memory_back(tmp_path: Path) -> None:
    """32 rows of 88 tokens, of which a rank's head of 256 takes 4 KiB each over two layers: 11 MiB."""
    model_dir = tiny.make_model("qwen3", tmp_path / "model", head_dim=256)
    engine = load(model_dir, {}, 2, max_num_seqs=32, max_num_batched_tokens=512, sleeps=True)
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    engine.generate([Request(tiny.prompt(80, i), None, sampling) for i in range(32)])
    (rank,) = (psutil.Process(pid) for pid in pids_of(engine))
    before = rank.memory_info().rss
    engine.sleep()
    asleep = rank.memory_info().rss
    engine.close()
    assert before - asleep > 8 << 20


def test_an_engine_is_awake_when_all_its_ranks_are(engine: Engine) -> None:
    before = outputs(engine, [None])
    engine.sleep()
    (pid,) = pids_of(engine)
    os.kill(pid, signal.SIGSTOP)
    waking = threading.Thread(target=engine.wake)
    waking.start()
    waking.join(STILL_S)
    assert waking.is_alive()
    assert engine.is_asleep
    os.kill(pid, signal.SIGCONT)
    waking.join(DEADLINE_S)
    assert not waking.is_alive()
    assert outputs(engine, [None]) == before


def test_an_adapter_that_is_forgotten_asleep_is_gone_from_every_rank(
    engine: Engine, tiny_adapters: dict[str, Path]
) -> None:
    wanted = outputs(engine, ["rank16_rslora"])
    outputs(engine, ["rank8"])
    engine.sleep()
    engine.remove_adapter("rank8")
    engine.wake()
    engine.add_adapter("rank8", tiny_adapters["rank16_rslora"])
    assert outputs(engine, ["rank8"]) == wanted
    engine.check_integrity()


@pytest.mark.parametrize("dies_first", [True, False])
def test_a_rank_that_dies_asleep_is_named_by_whoever_wants_the_engine(dies_first: bool, engine: Engine) -> None:
    """Before the engine sleeps, too: a sleep that one rank is not in is none."""
    (pid,) = pids_of(engine)
    if not dies_first:
        engine.sleep()
    os.kill(pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(RankDied, match="rank 1 was ended by signal 9"):
            engine.sleep() if dies_first else engine.wake()
    engine.close()


def test_an_engine_that_sleeps_can_be_closed(engine: Engine) -> None:
    ranks = pids_of(engine)
    engine.sleep()
    engine.close()
    assert not any(psutil.pid_exists(pid) for pid in ranks)


class Mine:
    """Rank 0's memory: says what is asked of it, fails where it is told to."""

    can_sleep = True

    def __init__(self, said: list[str]) -> None:
        self.said, self.fails = said, ""

    def sleep(self) -> None:
        self._do("sleep")

    def wake(self) -> None:
        self._do("wake")

    def _do(self, what: str) -> None:
        self.said.append(f"0 {what}")
        if self.fails == what:
            self.fails = ""
            raise RuntimeError(f"rank 0 cannot {what}")


class Others:
    """What `Followers` answers where a rank cannot, once."""

    can_sleep = True

    def __init__(self, said: list[str]) -> None:
        self.said, self.fails = said, ""

    def sleep(self) -> str | None:
        return self._do("sleep")

    def begin_wake(self) -> None: ...

    def await_woken(self) -> str | None:
        return self._do("wake")

    def _do(self, what: str) -> str | None:
        self.said.append(f"1 {what}")
        if self.fails != what:
            return None
        self.fails = ""
        return f"rank 1 cannot {what}"


@pytest.mark.parametrize(
    ("rank", "what", "wanted"),
    [
        (0, "sleep", ["0 sleep"]),
        (1, "sleep", ["0 sleep", "1 sleep", "0 wake", "1 wake"]),
        (0, "wake", ["0 wake", "1 wake", "0 sleep", "1 sleep"]),
        (1, "wake", ["0 wake", "1 wake", "0 sleep", "1 sleep"]),
    ],
)
def test_where_one_rank_cannot_none_does_and_it_may_be_tried_again(rank: int, what: str, wanted: list[str]) -> None:
    said: list[str] = []
    mine, others = Mine(said), Others(said)
    memory = RanksMemory(mine, others)  # type: ignore[arg-type]
    change = memory.sleep if what == "sleep" else memory.wake
    (mine, others)[rank].fails = what
    with pytest.raises(RuntimeError, match=f"rank {rank} cannot {what}"):
        change()
    assert said == wanted
    said.clear()
    change()
    assert said == [f"0 {what}", f"1 {what}"]


@pytest.fixture
def shell(tiny_model: Path) -> Iterator[Shell]:
    fields = {"max_num_seqs": 4, "max_model_len": 128}
    made = Shell(EngineConfig(model_dir=str(tiny_model), tensor_parallel=2, sleeps=True, **fields))
    made.listen(has(Ready), DEADLINE_S)
    yield made
    made.close()


def test_an_engine_process_sleeps_and_wakes_with_its_ranks_and_dies_asleep_with_any(shell: Shell) -> None:
    (ready,) = (message for message in shell.said if isinstance(message, Ready))
    assert ready.can_sleep
    first, again = item(max_tokens=9), item(max_tokens=9)
    shell.send(Add((first,)))
    shell.listen(has(Finished))
    shell.send(Sleep())
    shell.listen(has(Asleep))
    shell.send(Wake())
    shell.listen(has(Awake))
    shell.send(Add((again,)))
    shell.listen(has(Finished, 2))
    answers = shell.finished()
    assert answers[again.key].token_ids == answers[first.key].token_ids
    shell.send(Sleep())
    shell.listen(has(Asleep, 2))
    (rank,) = _ranks_of(shell.process.pid)
    os.kill(rank, signal.SIGKILL)
    assert shell.process.wait(DEADLINE_S) == 137
