"""The engine as a real process at the end of a socketpair."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from engine_shell import Shell, has, item, launch
from timing import NUM_TRIES, keeps_to, timed

from medley.spec.errors import ErrorCode
from medley.spec.jobs import FinishReason
from medley.spec.wire import (
    Abort,
    AdapterRef,
    Add,
    Asleep,
    Awake,
    Batch,
    EngineConfig,
    EngineStats,
    Finished,
    Forget,
    JobKey,
    Progress,
    Ready,
    Release,
    Released,
    Running,
    Shutdown,
    Sleep,
    Upcoming,
    Wake,
)
from medley_worker.engine.outbox import Outbox


@pytest.fixture
def start(tiny_model: Path) -> Iterator[Callable[..., Shell]]:
    """Starts engines that are the test's own, to end them or start them otherwise."""
    shells: list[Shell] = []

    def start_one(failpoint: str | None = None, **config: object) -> Shell:
        shells.append(launch(tiny_model, failpoint, **config))
        return shells[-1]

    yield start_one
    for shell in shells:
        shell.close()


@pytest.fixture(scope="module")
def shared_shell(tiny_model: Path) -> Iterator[Shell]:
    shell = launch(tiny_model)
    yield shell
    shell.send(Shutdown())
    assert isinstance(shell.listen_to_end()[-1], EngineStats)
    assert shell.process.wait(timeout=60) == 0
    shell.close()


@pytest.fixture
def shell(shared_shell: Shell) -> Shell:
    """An engine without work that lives on after the test."""
    shared_shell.said.clear()
    return shared_shell


def test_jobs_good_and_bad_each_get_one_answer(shell: Shell, tmp_path: Path) -> None:
    nowhere = AdapterRef(uuid4(), uuid4(), str(tmp_path / "gone"))
    good, long = item(), item((1,) * 128)
    outside, lost = item((1, 10**9)), item(adapter=nowhere)
    huge = item((1, 2**64 - 1))
    shell.send(Add(items=(good, long, outside, lost, huge)))
    shell.listen(has(Finished, 5))
    answers = shell.finished()
    assert answers[good.key].error is None
    assert answers[good.key].finish_reason is FinishReason.LENGTH
    assert len(answers[good.key].token_ids) == len(answers[good.key].logprobs) == 4
    codes = {key: answers[key].error for key in (long.key, outside.key, lost.key, huge.key)}
    assert [error.code for error in codes.values() if error is not None] == [
        ErrorCode.PROMPT_TOO_LONG,
        ErrorCode.INVALID_TOKEN,
        ErrorCode.ADAPTER_UNAVAILABLE,
        ErrorCode.INVALID_TOKEN,
    ]
    again = item()
    shell.send(Add(items=(again,)))
    shell.listen(has(Finished, 6))
    assert shell.finished()[again.key].token_ids == answers[good.key].token_ids


def test_a_job_is_named_as_running_once_and_before_its_end(shell: Shell) -> None:
    items = tuple(item(max_tokens=n) for n in (1, 5, 9, 13, 3, 2, 8))
    shell.send(Add(items=items))
    said = shell.listen(has(Finished, len(items)))
    named: list[JobKey] = []
    for message in said:
        if isinstance(message, Running):
            named += message.keys
        elif isinstance(message, Finished):
            assert message.key in named
    assert sorted(named, key=lambda key: key.job) == sorted((i.key for i in items), key=lambda key: key.job)


def test_progress_comes_for_those_who_asked_and_sums_to_the_result(shell: Shell) -> None:
    asked, silent = item(max_tokens=9, want_progress=True), item(max_tokens=9)
    shell.send(Add(items=(asked, silent)))
    said = shell.listen(has(Finished, 2))
    progress = [m for m in said if isinstance(m, Progress)]
    assert {m.key for m in progress} == {asked.key}
    tokens = [t for m in progress for t in m.token_ids]
    whole = shell.finished()[asked.key].token_ids
    assert tuple(tokens) == whole[: len(tokens)]
    assert len(tokens) == 8  # the last one is in Finished


def test_a_released_job_goes_on_where_it_was(shell: Shell) -> None:
    for _ in range(NUM_TRIES):  # whose word comes too late, once the job has ended, tries again
        shell.said.clear()
        job = item(max_tokens=100, want_progress=True)
        shell.send(Add(items=(job,)))
        shell.listen(has(Progress, 3))
        shell.send(Release(keys=(job.key, JobKey(uuid4(), 1))))
        said = shell.listen(lambda said: has(Released)(said) or has(Finished)(said))
        if not shell.finished():
            break
    (released,) = [m for m in said if isinstance(m, Released)]
    kept = released.checkpoint
    assert 3 <= len(kept.token_ids) == len(kept.logprobs) < 100
    resumed = item(max_tokens=100, checkpoint=kept)
    whole = item(max_tokens=100)
    shell.send(Add(items=(resumed, whole)))
    shell.listen(has(Finished, 2))
    answers = shell.finished()
    assert answers[resumed.key].token_ids == answers[whole.key].token_ids
    assert answers[resumed.key].logprobs[: len(kept.logprobs)] == kept.logprobs
    assert job.key not in answers


def test_nothing_is_reported_for_an_aborted_job(shell: Shell) -> None:
    job, other = item(max_tokens=120, want_progress=True), item()
    shell.send(Add(items=(job,)))
    shell.listen(has(Progress))
    shell.send(Abort(keys=(job.key,)))
    shell.send(Add(items=(other,)))
    shell.listen(lambda _: other.key in shell.finished())
    shell.said.clear()
    shell.listen(has(EngineStats, 2))
    assert all(isinstance(m, EngineStats | Batch) for m in shell.said)
    stats = [m for m in shell.said if isinstance(m, EngineStats)][-1]
    assert stats.num_running == stats.num_waiting == stats.pages_used == 0


def test_who_is_in_the_rows_is_said_while_there_is_work(shell: Shell) -> None:
    jobs = [item(max_tokens=120) for _ in range(400)]  # seconds of work
    shell.send(Add(items=tuple(jobs)))
    shell.listen(lambda said: any(isinstance(m, Batch) and m.decoding for m in said))
    batch = next(m for m in reversed(shell.said) if isinstance(m, Batch) and m.decoding)
    assert len(batch.decoding) + len(batch.prefilling) <= 4
    assert {*batch.decoding, *batch.prefilling} <= {job.key for job in jobs}
    shell.send(Abort(keys=tuple(job.key for job in jobs)))
    shell.listen(lambda said: [m for m in said if isinstance(m, Batch)][-1:] == [Batch()])


def test_a_crash_comes_after_its_suspects_were_named(start: Callable[..., Shell]) -> None:
    shell = start(failpoint="die_on_token=99")
    first = item()
    shell.send(Add(items=(first,)))
    shell.listen(has(Finished))
    poison, mate = item((5, 99)), item()
    shell.send(Add(items=(poison, mate)))
    said = shell.listen_to_end()
    named = {key for m in said if isinstance(m, Running) for key in m.keys}
    assert named == {first.key, poison.key, mate.key}
    assert set(shell.finished()) == {first.key}
    assert shell.process.wait(timeout=60) == 137


def test_the_engine_ends_within_a_second_of_its_shell(start: Callable[..., Shell]) -> None:
    def end(is_busy: bool) -> float:
        shell = start()
        if is_busy:  # with seconds of work
            shell.send(Add(items=tuple(item(max_tokens=120, want_progress=True) for _ in range(400))))
            shell.listen(has(Progress))
        with timed() as took:
            shell.connection.close()
            shell.process.wait(timeout=60)
        return took.seconds

    for is_busy in (False, True):
        keeps_to(1.0, lambda is_busy=is_busy: end(is_busy))  # type: ignore[misc]


def test_an_idle_engine_uses_no_processor_time(shell: Shell) -> None:

    def used_s() -> float:
        fields = Path(f"/proc/{shell.process.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    shell.listen(has(EngineStats, 1))
    before, said = used_s(), len(shell.said)
    shell.listen(lambda _: len(shell.said) >= said + 2)  # two intervals of statistics
    assert used_s() - before < 0.2


def test_an_engine_without_a_model_ends_and_says_why(tmp_path: Path) -> None:
    shell = Shell(EngineConfig(model_dir=str(tmp_path)))
    assert shell.listen_to_end() == []
    assert shell.process.wait(timeout=60) == 2
    shell.close()


def test_tokens_come_without_a_forward_pass_when_asked(start: Callable[..., Shell]) -> None:
    shell = start(forward="null")
    jobs = tuple(item(max_tokens=20) for _ in range(40))
    shell.send(Add(items=jobs))
    shell.listen(has(Finished, 40))
    assert all(len(m.token_ids) == 20 for m in shell.finished().values())


def test_the_outbox_keeps_order_while_the_reader_is_slow() -> None:
    ours, theirs = socket.socketpair()
    outbox = Outbox(theirs, max_backlog_bytes=1 << 20)
    frames = [i.to_bytes(4, "little") * 20_000 for i in range(40)]
    received = bytearray()
    for frame in frames[:10]:
        outbox.put(frame)
    while len(received) < 10 * len(frames[0]):
        received += ours.recv(50_000)
    outbox.flush()
    for frame in frames[10:20]:
        outbox.put(frame)
    while len(received) < 20 * len(frames[0]):
        received += ours.recv(50_000)
    assert bytes(received) == b"".join(frames[:20])
    ours.close()
    for frame in frames[20:]:
        outbox.put(frame)  # the peer has gone: dropped, not waited for
    outbox.close()
    theirs.close()


def test_revisions_in_memory_are_told(shell: Shell, tiny_adapters: dict[str, Path]) -> None:
    adapter = AdapterRef(uuid4(), UUID(int=7), str(tiny_adapters["rank8"]))
    shell.send(Add(items=(item(adapter=adapter),)))
    shell.listen(has(Finished))
    shell.said.clear()
    stats = next(m for m in shell.listen(has(EngineStats)) if isinstance(m, EngineStats))
    assert stats.resident == (UUID(int=7),)
    assert stats.adapter_loads == 1


def test_a_job_that_cannot_be_taken_in_still_gets_its_answer(shell: Shell) -> None:
    """The path is one that no file system takes, which no check before foresees."""
    bad, good = item(adapter=AdapterRef(uuid4(), uuid4(), "/no\0where")), item()
    shell.send(Add((bad, good)))
    shell.listen(has(Finished, 2))
    error = shell.finished()[bad.key].error
    assert error is not None
    assert error.code is ErrorCode.ENGINE
    assert shell.finished()[good.key].error is None


def test_an_engine_sleeps_and_wakes_between_jobs_and_gives_the_same_answers(
    start: Callable[..., Shell], tiny_adapters: dict[str, Path]
) -> None:
    shell = start(sleeps=True)
    adapter = AdapterRef(uuid4(), UUID(int=7), str(tiny_adapters["rank8"]))
    (ready,) = (m for m in shell.said if isinstance(m, Ready))
    assert ready.can_sleep
    told: list[tuple[int, ...]] = []
    for turn in range(3):
        shell.said.clear()
        job, based = item(max_tokens=9, adapter=adapter), item(max_tokens=9)
        shell.send(Add(items=(job, based)))
        shell.listen(has(Finished, 2))
        told.append(shell.finished()[job.key].token_ids + shell.finished()[based.key].token_ids)
        shell.said.clear()
        shell.send(Sleep())
        shell.listen(has(Asleep))
        shell.said = shell.said[[isinstance(m, Asleep) for m in shell.said].index(True) + 1 :]
        said = shell.listen(has(EngineStats, 2))  # with the answer, and a second later
        assert all(m.resident == () for m in said if isinstance(m, EngineStats))
        if turn == 1:
            shell.send(Forget(adapters=(adapter,)))
        shell.send(Wake())
        shell.listen(has(Awake))
    assert told[0] == told[1] == told[2]


def test_what_a_sleeping_engine_forgets_is_nowhere_in_it(
    start: Callable[..., Shell], tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Neither header nor host copy: without its files the adapter cannot be had again. The others can."""
    shell = start(sleeps=True)
    refs = []
    for i in range(2):
        shutil.copytree(tiny_adapters["rank8"], tmp_path / str(i))
        refs.append(AdapterRef(tenant=uuid4(), revision=uuid4(), path=str(tmp_path / str(i))))
    shell.send(Upcoming(adapters=tuple(refs)))
    shell.send(Add(items=tuple(item(adapter=ref) for ref in refs)))
    shell.listen(has(Finished, 2))
    shell.said.clear()
    shell.send(Sleep())
    for ref in refs:
        shutil.rmtree(ref.path)
    shell.send(Forget(adapters=(refs[0],)))
    shell.send(Wake())
    jobs = [item(adapter=ref) for ref in refs]
    shell.send(Add(items=tuple(jobs)))
    shell.listen(has(Finished, 2))
    gone, kept = (shell.finished()[job.key].error for job in jobs)
    assert kept is None
    assert gone is not None
    assert gone.code is ErrorCode.ADAPTER_UNAVAILABLE


def test_an_engine_that_cannot_sleep_says_so_and_ends_when_it_is_told_to(start: Callable[..., Shell]) -> None:
    shell = start()
    (ready,) = (m for m in shell.said if isinstance(m, Ready))
    assert not ready.can_sleep
    shell.send(Sleep())
    assert not any(isinstance(m, Asleep) for m in shell.listen_to_end())
    assert shell.process.wait(timeout=60) == 3


def test_an_engine_asleep_ends_with_its_shell_or_at_its_word(start: Callable[..., Shell]) -> None:
    for farewell in (True, False):
        shell = start(sleeps=True)
        shell.send(Sleep())
        shell.listen(has(Asleep))
        if farewell:
            shell.send(Shutdown())
            shell.listen_to_end()
        else:
            shell.connection.close()
        assert shell.process.wait(timeout=60) == 0
