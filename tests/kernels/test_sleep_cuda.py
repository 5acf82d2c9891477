"""Sleep and wake on CUDA: addresses and bits stay, memory goes and comes, others can have it meanwhile.

Amounts are the device's own, of all processes: nobody else may take or give any while these tests run.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from uuid import UUID

import cuda_models
import pytest
import torch
from cuda_models import Tiny, load_engine, prompt

from medley.spec.wire import (
    AdapterRef,
    Add,
    Asleep,
    Awake,
    EngineConfig,
    Finished,
    Ready,
    Shutdown,
    Sleep,
    Wake,
)
from medley_worker import Engine, Request, SamplingParams
from medley_worker.ops import memory_cuda
from medley_worker.ops.kernels import KernelError
from medley_worker.ops.memory_cuda import PIECE_BYTES, PinnedCopy, VirtualMemory

pytestmark = pytest.mark.gpu

Report = Callable[[str], None]
DEVICE = torch.device("cuda")
MIB = 1 << 20
ASLEEP_BYTES = 2 << 30  # the most that may be held
TILE_BYTES = 4 << 30  # of adapter memory, so that it is worth giving back
# The device tells more than our account: the driver takes memory of its own, 2 MiB at a time (for page tables, pinned
# memory, a kernel's first use), when it likes. It is little beside what a test looks for.
SLACK = 64 * MIB
START_S = 300.0  # kernels may have to be built, when they are first used


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return cuda_models.make("llama3", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def tidy() -> Iterator[None]:
    """Nothing of an earlier test is given back in the middle of this one: an engine is held by its own callbacks."""
    give_back()
    yield
    give_back()


def give_back() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@pytest.fixture
def sleeper(llama: Tiny) -> Iterator[Callable[..., Engine]]:
    """Makes engines with memory for all adapters and for more."""
    engines: list[Engine] = []

    def make(**options: object) -> Engine:
        sizes = {"max_num_seqs": 16, "max_model_len": 256, "adapter_bytes": TILE_BYTES, "sleeps": True}
        engines.append(load_engine(llama, **sizes | options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def requests(made: Tiny) -> list[Request]:
    """Greedy and drawn, of every adapter and of the base."""
    greedy = SamplingParams(max_tokens=24, ignore_eos=True)
    drawn = SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, seed=3)
    return [
        Request(prompt(5 + 9 * i, seed=i), name, sampling)
        for i, name in enumerate(made.names)
        for sampling in (greedy, drawn)
    ]


def outputs(engine: Engine, made: Tiny) -> list[tuple[list[int], list[float]]]:
    return [(completion.token_ids, completion.logprobs) for completion in engine.generate(requests(made))]


def used_bytes() -> int:
    """Of the device, by all processes."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_memory_keeps_addresses_and_what_is_kept_and_a_captured_graph_runs_on() -> None:
    memory = VirtualMemory(DEVICE)
    small, large = memory.kept([1000, PIECE_BYTES + 3 * MIB])
    weight = small[:512].view(torch.float32).normal_()
    large.random_(0, 256)
    digest = large.view(torch.int32).sum(dtype=torch.int64).item()
    into = memory.cleared((128,), torch.float32)
    assert not into.any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        into.add_(weight)
    graph.replay()
    wanted = into.clone()
    places = [tensor.data_ptr() for tensor in (small, large, into)]
    held = memory.num_bytes
    assert held >= PIECE_BYTES
    for _ in range(3):
        before = used_bytes()
        memory.sleep()
        assert memory.num_bytes == 0
        assert before - used_bytes() >= held - SLACK
        memory.wake()
        assert memory.num_bytes == held
        assert [tensor.data_ptr() for tensor in (small, large, into)] == places
        assert large.view(torch.int32).sum(dtype=torch.int64).item() == digest
        assert not into.any()
        graph.replay()
        assert torch.equal(into, wanted)


def test_memory_ends_with_its_last_tensor() -> None:
    before = used_bytes()
    memory = VirtualMemory(DEVICE)
    view = memory.cleared((1 << 30,), torch.uint8)[5:6]
    assert used_bytes() - before >= (1 << 30) - SLACK
    del memory
    view.fill_(1)
    assert view.item() == 1
    assert used_bytes() - before >= (1 << 30) - SLACK
    del view
    gc.collect()
    assert used_bytes() - before < SLACK


def test_a_pinned_copy_takes_and_gives_bytes_as_they_are() -> None:
    copy = PinnedCopy(3 * MIB)
    assert copy.memory.is_pinned()
    source = torch.randint(0, 256, (3 * MIB,), dtype=torch.uint8, device=DEVICE)
    copy.memory.copy_(source, non_blocking=True)
    back = torch.empty_like(source)
    back.copy_(copy.memory, non_blocking=True)
    assert torch.equal(back, source)


@pytest.mark.parametrize("is_invariant", [False, True])
def test_results_are_bit_equal_before_and_after_ten_sleeps(
    llama: Tiny, sleeper: Callable[..., Engine], is_invariant: bool, report: Report
) -> None:
    """With the graphs of before, and as much memory in use after the last sleep as after the first."""
    engine = sleeper(batch_invariant=is_invariant)
    outputs(engine, llama)  # loads adapters: while one is on its way, steps are made of other rows
    before = outputs(engine, llama)
    asleep: list[int] = []
    awake: list[int] = []
    for _ in range(10):
        engine.sleep()
        engine.check_integrity()
        asleep.append(used_bytes())
        engine.wake()
        assert outputs(engine, llama) == before or not is_invariant
        engine.check_integrity()
        assert outputs(engine, llama) == before
        awake.append(used_bytes())
    report(
        f"{(awake[0] - asleep[0]) / MIB:.0f} MiB given back; at the last of ten sleeps"
        f" {(asleep[-1] - asleep[0]) / MIB:.0f} MiB more asleep and {(awake[-1] - awake[0]) / MIB:.0f} more awake"
        " than at the first"
    )
    assert awake[0] - asleep[0] >= TILE_BYTES - SLACK
    assert asleep[-1] - asleep[0] < SLACK
    assert awake[-1] - awake[0] < SLACK


def test_adapters_come_back_into_tiles_and_leave_them_after_a_sleep(
    llama: Tiny, sleeper: Callable[..., Engine]
) -> None:
    """With tiles for one adapter of rank 128: whoever runs evicts the one before.

    Bits are compared though rows have other neighbours the second time, as adapters arrive when they do.
    """
    engine = sleeper(adapter_bytes=None, adapter_slots=1, batch_invariant=True)
    before = outputs(engine, llama)
    evictions = engine.stats().adapter_evictions
    engine.sleep()
    assert engine.stats().tiles_used == 0
    name = next(iter(llama.adapters))
    engine.remove_adapter(name)
    engine.add_adapter(name, llama.adapters[name])
    engine.wake()
    after = outputs(engine, llama)
    assert engine.stats().adapter_evictions > evictions
    engine.check_integrity()
    assert after == before


def test_waking_without_memory_says_what_is_missing_takes_none_and_can_be_tried_again(
    llama: Tiny, sleeper: Callable[..., Engine]
) -> None:
    engine = sleeper()
    outputs(engine, llama)
    before = outputs(engine, llama)
    engine.sleep()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - TILE_BYTES // 2, dtype=torch.uint8, device=DEVICE)
    left = used_bytes()
    try:
        with pytest.raises(KernelError, match=r"memory of [0-9]+ bytes: out of memory"):
            engine.wake()
        assert engine.is_asleep
        assert used_bytes() - left < SLACK, "the part that there was room for"
    finally:
        del taken
        torch.cuda.empty_cache()
    engine.wake()
    outputs(engine, llama)
    assert outputs(engine, llama) == before


def test_without_room_on_the_host_an_engine_stays_awake_and_works(
    llama: Tiny, sleeper: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = sleeper()
    outputs(engine, llama)
    before = outputs(engine, llama)
    with monkeypatch.context() as patched:
        patched.setattr(memory_cuda, "HOST_SHARE", 0.0)
        with pytest.raises(RuntimeError, match=r"host memory: [0-9]+ bytes are wanted"):
            engine.sleep()
    assert not engine.is_asleep
    outputs(engine, llama)
    assert outputs(engine, llama) == before
    engine.sleep()
    engine.wake()
    outputs(engine, llama)
    assert outputs(engine, llama) == before


def test_an_engine_process_holds_two_gigabytes_at_the_most_while_asleep(llama: Tiny, report: Report) -> None:
    """As the device tells another process, which this one is."""
    from engine_shell import Shell, has, item

    before = used_bytes()
    config = EngineConfig(
        model_dir=str(llama.model_dir),
        device="cuda",
        dtype="bfloat16",
        max_num_seqs=32,
        max_model_len=256,
        adapter_bytes=TILE_BYTES,
        sleeps=True,
    )
    shell = Shell(config)
    try:
        shell.listen(has(Ready), START_S)
        adapter = AdapterRef(UUID(int=1), UUID(int=2), str(llama.adapters["rank8"]))
        told: list[tuple[int, ...]] = []
        for _ in range(3):
            shell.said.clear()
            job = item(max_tokens=20, adapter=adapter)
            shell.send(Add(items=(job,)))
            shell.listen(has(Finished), START_S)
            told.append(shell.finished()[job.key].token_ids)
            awake = used_bytes() - before
            shell.said.clear()
            shell.send(Sleep())
            shell.listen(has(Asleep))
            asleep = used_bytes() - before
            (answer,) = (m for m in shell.said if isinstance(m, Asleep))
            shell.send(Wake())
            shell.listen(has(Awake))
        report(
            f"engine process: {awake / MIB:.0f} MiB awake, {asleep / MIB:.0f} asleep, {answer.device_bytes / MIB:.0f}"
            " by its own account"
        )
        assert told[0] == told[1] == told[2]
        assert asleep <= ASLEEP_BYTES
        assert awake - asleep >= TILE_BYTES - SLACK
        assert abs(answer.device_bytes - asleep) < 512 * MIB
        shell.send(Shutdown())
        shell.listen_to_end()
    finally:
        shell.close()


def test_a_process_that_is_killed_asleep_leaves_nothing_on_the_device(llama: Tiny) -> None:
    from engine_shell import Shell, has

    before = used_bytes()
    config = EngineConfig(
        model_dir=str(llama.model_dir), device="cuda", dtype="bfloat16", max_num_seqs=4, max_model_len=128, sleeps=True
    )
    shell = Shell(config)
    try:
        shell.listen(has(Ready), START_S)
        shell.send(Sleep())
        shell.listen(has(Asleep))
        shell.process.kill()
    finally:
        shell.close()
    # The driver may clear up after the process has been waited for.
    deadline = time.monotonic() + 60.0
    while used_bytes() - before >= SLACK:
        assert time.monotonic() < deadline, f"{used_bytes() - before} bytes are held by nobody"
        time.sleep(0.05)
