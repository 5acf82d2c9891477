"""Engines that sleep: what they are after it, what they refuse meanwhile, and memory that comes back as zeros."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from tiny import prompt

from medley_worker import Engine, Request, SamplingParams
from medley_worker.ops.memory import HostMemory, Memory, PlainMemory

NUM_NEW = 12


@pytest.fixture
def engine(tiny_model: Path, tiny_adapters: dict[str, Path]) -> Iterator[Engine]:
    """Tiles for two of the largest adapters, so that they take turns."""
    engine = Engine.load(tiny_model, max_num_seqs=8, max_model_len=128, adapter_slots=2, sleeps=True)
    for name, folder in tiny_adapters.items():
        engine.add_adapter(name, folder)
    yield engine
    engine.close()


def requests(names: list[str | None]) -> list[Request]:
    greedy = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)
    drawn = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True, temperature=1.0, seed=7)
    return [
        Request(prompt(3 + 5 * i % 17, seed=i), name, sampling)
        for i, name in enumerate(names)
        for sampling in (greedy, drawn)
    ]


def outputs(engine: Engine, names: list[str | None]) -> list[tuple[list[int], list[float]]]:
    return [(completion.token_ids, completion.logprobs) for completion in engine.generate(requests(names))]


def test_results_are_the_same_before_and_after_any_number_of_sleeps(
    engine: Engine, tiny_adapters: dict[str, Path]
) -> None:
    names = [None, *tiny_adapters]
    before = outputs(engine, names)
    for _ in range(3):
        engine.sleep()
        engine.check_integrity()
        assert engine.is_asleep
        assert engine.stats().tiles_used == 0
        assert engine.stats().resident == ()
        engine.wake()
        assert outputs(engine, names) == before
        engine.check_integrity()


def test_one_sleeps_and_wakes_once_however_often_it_is_told(engine: Engine) -> None:
    before = outputs(engine, [None])
    engine.wake()
    engine.sleep()
    engine.sleep()
    engine.wake()
    engine.wake()
    assert outputs(engine, [None]) == before


def test_a_request_that_was_released_goes_on_after_a_sleep_to_the_same_end(engine: Engine) -> None:
    (request,) = requests(["rank8"])[1:]
    (whole,) = engine.generate([request])
    engine.add_request("one", request)
    for _ in range(5):
        engine.step()
    (checkpoint,) = engine.release().values()
    assert 0 < len(checkpoint.token_ids) < NUM_NEW
    engine.sleep()
    engine.wake()
    engine.add_request("one", request, checkpoint)
    found: list[int] = []
    while engine.has_work:
        for output in engine.step():
            if output.is_finished:
                found = list(output.token_ids)
    assert found == whole.token_ids


def test_with_requests_in_flight_or_without_a_way_sleep_is_refused_and_nothing_changes(
    engine: Engine, tiny_model: Path
) -> None:
    engine.add_request("one", requests([None])[0])
    with pytest.raises(RuntimeError, match="without requests in flight"):
        engine.sleep()
    assert not engine.is_asleep
    while engine.has_work:
        engine.step()
    awake = Engine.load(tiny_model, max_num_seqs=2, max_model_len=64)
    assert not awake.can_sleep
    with pytest.raises(RuntimeError, match="without `sleeps`"):
        awake.sleep()
    assert len(awake.generate(requests([None]))) == 2
    awake.close()


def test_without_room_for_what_is_kept_an_engine_stays_awake_and_works(
    engine: Engine, tiny_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = outputs(engine, [None, *tiny_adapters])

    def refuse(_: HostMemory) -> None:
        raise RuntimeError("host memory: too little")

    with monkeypatch.context() as patched:
        patched.setattr(HostMemory, "sleep", refuse)
        with pytest.raises(RuntimeError, match="too little"):
            engine.sleep()
    assert not engine.is_asleep
    assert outputs(engine, [None, *tiny_adapters]) == before
    engine.sleep()
    engine.wake()
    assert outputs(engine, [None, *tiny_adapters]) == before


def test_an_engine_asleep_takes_no_requests_and_can_be_closed(engine: Engine) -> None:
    engine.sleep()
    with pytest.raises(RuntimeError, match="asleep"):
        engine.generate(requests([None]))
    assert not engine.has_work
    engine.close()


def test_an_adapter_that_is_forgotten_asleep_stays_forgotten(engine: Engine) -> None:
    outputs(engine, ["rank8"])
    engine.sleep()
    engine.remove_adapter("rank8")
    engine.check_integrity()
    engine.wake()
    with pytest.raises(ValueError, match="rank8"):
        outputs(engine, ["rank8"])


@pytest.mark.parametrize("make", [HostMemory, lambda: PlainMemory(torch.device("cpu"))])
def test_memory_is_zeros_and_fits_every_dtype_and_shape(make: type[Memory]) -> None:
    memory = make()
    for shape, dtype in (((3, 5), torch.bfloat16), ((7,), torch.uint8), ((2, 0, 4), torch.float32)):
        tensor = memory.cleared(shape, dtype)
        assert tensor.shape == shape
        assert tensor.dtype is dtype
        assert not tensor.any()
        tensor.fill_(3)
    sizes = [10, 512, 1]
    assert [len(tensor) for tensor in memory.kept(sizes)] == sizes


def test_host_memory_goes_back_to_the_system_and_comes_as_zeros_at_the_same_place() -> None:
    memory, size = HostMemory(), 64 << 20
    kept = memory.kept([1 << 20])[0].fill_(7)
    cleared = memory.cleared((size // 4,), torch.float32).fill_(1.0)
    address, process = cleared.data_ptr(), psutil.Process(os.getpid())
    before = process.memory_info().rss
    memory.sleep()
    assert before - process.memory_info().rss > size * 3 // 4
    memory.wake()
    assert cleared.data_ptr() == address
    assert not cleared.any()
    assert (kept == 7).all()
