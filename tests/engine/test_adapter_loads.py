"""Adapters read ahead of need and copied beside steps: on a simulated device whose streams run as late as they may."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest
import tiny
import torch
from torch import Tensor

from medley.spec.base_models import BaseModel, read_base_model
from medley.spec.errors import ErrorCode
from medley.spec.wire import AdapterRef
from medley_worker import Engine, Request, RequestOutput, SamplingParams
from medley_worker.engine import adapter_loader, adapters, host_tiles
from medley_worker.engine.adapters import AdapterCache, AdapterKey, AdapterUnavailable
from medley_worker.engine.copies import Fence, HostCopier
from medley_worker.engine.residency import CachedResidency
from medley_worker.ops.lora_stage import AdapterTiles

NUM_ADAPTERS = 6
TILES = 4  # of an adapter of rank 8: one a projection group
DEADLINE_S = 30.0


@dataclass(eq=False)
class SimulatedFence:
    device: SimulatedDevice
    is_reached: bool = False

    def wait(self) -> None:
        self.device.run_until(self)


@dataclass
class Operation:
    run: Callable[[], None]
    after: SimulatedFence | None
    fence: SimulatedFence


class SimulatedDevice(HostCopier):
    """Two streams in order, each operation at any time after what it waits for."""

    is_async = True

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._lock = threading.RLock()
        self._copies: deque[Operation] = deque()
        self._steps: deque[Operation] = deque()
        self.num_run = 0

    def new_host(self, count: int, elements: int, dtype: torch.dtype) -> Tensor:
        return torch.full((count, elements), torch.nan, dtype=dtype)  # as pinned memory: anything may be in it

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Fence | None) -> Fence:
        def run() -> None:
            for to, source in pairs:
                to.copy_(source)

        assert after is None or isinstance(after, SimulatedFence)
        return self._put(self._copies, run, after)

    def mark(self) -> Fence:
        return self._put(self._steps, _nothing, None)

    def join(self, fence: Fence) -> None:
        assert isinstance(fence, SimulatedFence)
        self._put(self._steps, _nothing, fence)

    def step(self, run: Callable[[], None]) -> SimulatedFence:
        return self._put(self._steps, run, None)

    def run_some(self) -> None:
        """As much as happens to run in a moment."""
        with self._lock:
            for _ in range(self._rng.choice([0, 0, 1, 3])):
                self._run_one()

    def run_until(self, fence: SimulatedFence) -> None:
        with self._lock:
            while not fence.is_reached:
                assert self._run_one(), "the streams wait for each other"

    def _put(self, stream: deque[Operation], run: Callable[[], None], after: SimulatedFence | None) -> SimulatedFence:
        fence = SimulatedFence(self)
        with self._lock:
            stream.append(Operation(run, after, fence))
        return fence

    def _run_one(self) -> bool:
        streams = [self._copies, self._steps]
        self._rng.shuffle(streams)
        for stream in streams:
            if stream and (stream[0].after is None or stream[0].after.is_reached):
                operation = stream.popleft()
                operation.run()
                operation.fence.is_reached = True
                self.num_run += 1
                return True
        return False


def _nothing() -> None:
    return


@dataclass
class NoLora:
    """A device's LoRA of which nothing is asked."""

    steps: list[int] = field(default_factory=list)

    def batch(self, adapters: Sequence[AdapterTiles | None], num_tokens: Sequence[int]) -> None:
        self.steps.append(len(adapters) + len(num_tokens))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_tiles, "CHUNK_BYTES", 1 << 17)


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tiny_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    del tiny_model
    folder = tmp_path_factory.mktemp("copies")
    for i in range(NUM_ADAPTERS):
        tiny.copy_adapter(tiny_adapters["rank8"], folder / str(i), seed=i)
    return folder


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> BaseModel:
    return read_base_model(tiny_model, need_weights=False)


def key(i: int) -> AdapterKey:
    return ("t", str(i))


def tensors_of(cache: AdapterCache, wanted: AdapterKey) -> list[Tensor]:
    """What lies where the adapter's tiles are, and its scales."""
    adapter = cache._memory[wanted]
    return [*(cache._memory.tiles[tile] for tiles in adapter.tiles.values() for tile in tiles), adapter.scales]


@pytest.fixture(scope="module")
def packed(model: BaseModel, folder: Path) -> dict[AdapterKey, list[Tensor]]:
    """What a cache that loads at once makes of each adapter."""
    cache = AdapterCache(model, num_tiles=NUM_ADAPTERS * TILES, dtype=torch.float32)
    for i in range(NUM_ADAPTERS):
        cache.register(key(i), folder / str(i))
        cache.load(key(i))
    return {key(i): [tensor.clone() for tensor in tensors_of(cache, key(i))] for i in range(NUM_ADAPTERS)}


@pytest.mark.parametrize("seed", range(6))
def test_each_step_finds_its_adapters_however_late_copies_and_steps_run(
    seed: int, model: BaseModel, folder: Path, packed: dict[AdapterKey, list[Tensor]]
) -> None:
    rng = random.Random(seed)
    device = SimulatedDevice(rng)
    tile_bytes = packed[key(0)][0].nbytes
    cache = AdapterCache(
        model,
        num_tiles=3 * TILES,
        dtype=torch.float32,
        host_bytes=rng.choice([1, 2, 4]) * TILES * tile_bytes,
        copier=device,
    )
    cache._memory.lora = NoLora()
    for i in range(NUM_ADAPTERS):
        cache.register(key(i), folder / str(i))
    pinned: list[AdapterKey] = []
    unread: deque[SimulatedFence] = deque()
    num_checked = 0

    def step(keys: list[AdapterKey]) -> Callable[[], None]:
        where = {k: tensors_of(cache, k) for k in keys}  # views: looked at when the step runs

        def run() -> None:
            nonlocal num_checked
            for k, found in where.items():
                assert all(map(torch.equal, found, packed[k])), f"a step read {k} half written"
                num_checked += 1

        return run

    for _ in range(300):
        if len(pinned) == 3 or (pinned and rng.random() < 0.4):
            cache.unpin(pinned.pop(rng.randrange(len(pinned))))
        line = rng.sample(range(NUM_ADAPTERS), NUM_ADAPTERS)
        cache.set_upcoming([key(i) for i in line])
        wanted = key(line[0])
        if wanted not in pinned and cache.can_admit(wanted):
            until_ready(cache, wanted)
            cache.load(wanted)
            cache.pin(wanted)
            pinned.append(wanted)
        if pinned:
            cache.lora_batch(pinned, [1] * len(pinned))
            unread.append(device.step(step(list(pinned))))
        while len(unread) > 1:
            device.run_until(unread.popleft())
        device.run_some()
        cache.check_integrity()
    while unread:
        device.run_until(unread.popleft())
    cache.close()
    assert num_checked > 300
    assert cache.evictions > 20


def until_ready(cache: AdapterCache, wanted: AdapterKey) -> None:
    for _ in range(100):
        if cache.is_ready(wanted):
            return
        cache.wait(DEADLINE_S)
    raise AssertionError("an adapter next in line is never ready")


def test_what_comes_is_read_before_it_is_registered_and_failures_are_told_when_it_is_wanted(
    model: BaseModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = AdapterCache(model, num_tiles=12, dtype=torch.float32, copier=SimulatedDevice(random.Random(0)))
    tiny.copy_adapter(folder / "0", tmp_path / "torn", seed=0)
    cache.register(key(9), tmp_path / "torn")
    (tmp_path / "torn" / "adapter_model.safetensors").unlink()
    cache.set_paths({key(0): folder / "0", key(8): tmp_path / "nowhere"})
    cache.set_upcoming([key(8), key(9), key(0), key(7)])
    for wanted in (key(8), key(9), key(0)):
        until_ready(cache, wanted)
    with pytest.raises(AdapterUnavailable, match="could not be read"):
        cache.load(key(9))
    with pytest.raises(AdapterUnavailable):
        cache.register(key(8), tmp_path / "nowhere")
    with monkeypatch.context() as patched:
        patched.setattr(adapter_loader, "pack_adapter", _fail)
        cache.register(key(0), folder / "0")
        cache.load(key(0))  # it was packed already
        cache.set_paths({key(1): folder / "1"})
        cache.set_upcoming([key(1)])
        until_ready(cache, key(1))
        cache.register(key(2), folder / "2")
        cache.set_upcoming([key(2)])
        until_ready(cache, key(2))
        with pytest.raises(AdapterUnavailable, match="ZeroDivisionError"):
            cache.load(key(2))
    cache.check_integrity()
    cache.close()
    cache.close()


def _fail(*_: object) -> None:
    raise ZeroDivisionError


class LazyCopier(HostCopier):
    """Asynchronous as seen from outside: copies run when a step joins them."""

    is_async = True

    def __init__(self) -> None:
        self._pending: list[tuple[SimulatedFence, Callable[[], None]]] = []
        self._device = SimulatedDevice(random.Random(0))

    def copy(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Fence | None) -> Fence:
        del after
        return self._device.copy(pairs, None)

    def join(self, fence: Fence) -> None:
        fence.wait()


@pytest.fixture
def ahead(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """An engine that reads adapters ahead, with room for three."""
    monkeypatch.setattr(adapters, "new_copier", lambda _: LazyCopier())
    engine = Engine.load(tiny_model, max_num_seqs=4, max_model_len=64, adapter_bytes=12 * 20480)
    yield engine
    engine.close()


def request(adapter: str | AdapterRef | None, max_tokens: int = 5) -> Request:
    return Request(tiny.prompt(6), adapter, SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def run(engine: Engine, until: int | None = None) -> dict[object, RequestOutput]:
    ended: dict[object, RequestOutput] = {}
    while engine.has_work and (until is None or len(ended) < until):
        ended |= {o.request_id: o for o in engine.step() if o.is_finished}
        engine.check_integrity()
    return ended


def test_answers_are_those_of_an_engine_that_loads_at_once(ahead: Engine, tiny_model: Path, folder: Path) -> None:
    plain = Engine.load(tiny_model, max_num_seqs=4, max_model_len=64, adapter_slots=1)
    refs = [AdapterRef(uuid4(), uuid4(), str(folder / str(i))) for i in range(NUM_ADAPTERS)]
    ahead.set_upcoming(refs)
    wanted = plain.generate([request(ref) for ref in refs * 3])
    got = ahead.generate([request(ref) for ref in refs * 3])
    assert [g.token_ids for g in got] == [w.token_ids for w in wanted]
    assert ahead.stats().adapter_evictions > 0
    plain.close()


def test_others_run_while_an_adapter_is_read_and_it_is_waited_for_when_nothing_else_is_there(
    ahead: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_disk_free = threading.Event()
    real = adapter_loader.pack_adapter

    def slow(*arguments: object) -> None:
        assert is_disk_free.wait(DEADLINE_S)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(adapter_loader, "pack_adapter", slow)
    ahead.add_adapter("slow", folder / "0")
    ahead.add_request("first", request("slow"))
    for i in range(6):
        ahead.add_request(i, request(None))
    assert set(run(ahead, until=6)) == set(range(6)), "the line waited for a disk"
    assert ahead.has_work
    assert ahead.step() == []
    is_disk_free.set()
    assert run(ahead)["first"].error is None


def test_adapters_that_are_read_when_sleep_comes_are_there_after_it_but_for_those_that_are_no_more(
    tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_read, is_disk_free = threading.Event(), threading.Event()
    real = adapter_loader.pack_adapter

    def slow(*arguments: object) -> None:
        is_read.set()
        assert is_disk_free.wait(DEADLINE_S)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(adapters, "new_copier", lambda _: LazyCopier())
    monkeypatch.setattr(adapter_loader, "pack_adapter", slow)
    engine = Engine.load(tiny_model, max_num_seqs=4, max_model_len=64, adapter_bytes=12 * 20480, sleeps=True)
    refs = [AdapterRef(uuid4(), uuid4(), str(folder / str(i))) for i in range(3)]
    engine.set_upcoming(refs[1:])
    engine.add_request("first", request(refs[0]))
    engine.step()
    assert is_read.wait(DEADLINE_S)
    engine.release()
    engine.sleep()
    engine.check_integrity()
    is_disk_free.set()
    engine.forget(refs[1:2])
    engine.wake()
    for i in (0, 2):
        engine.add_request(i, request(refs[i]))
    assert all(output.error is None for output in run(engine).values())
    assert not cast(CachedResidency, engine._parts.residency).is_ready((refs[1].tenant, refs[1].revision))
    engine.close()


def test_what_is_forgotten_is_not_read_because_it_was_to_come(ahead: Engine, folder: Path) -> None:
    gone, kept = (AdapterRef(uuid4(), uuid4(), str(folder / str(i))) for i in range(2))
    ahead.set_upcoming([gone, kept])
    ahead.forget([gone])
    residency = cast(CachedResidency, ahead._parts.residency)
    ahead.add_request("base", request(None))
    run(ahead)
    for _ in range(100):
        if residency.is_ready((kept.tenant, kept.revision)):
            break
        residency.wait(DEADLINE_S)
    else:
        raise AssertionError("what comes is never ready")
    assert not residency.is_ready((gone.tenant, gone.revision))


def test_an_adapter_that_cannot_be_read_fails_its_jobs_alone(ahead: Engine, folder: Path, tmp_path: Path) -> None:
    tiny.copy_adapter(folder / "0", tmp_path / "torn", seed=0)
    ahead.add_adapter("torn", tmp_path / "torn")
    (tmp_path / "torn" / "adapter_model.safetensors").unlink()
    for i in range(3):
        ahead.add_request(("torn", i), request("torn"))
        ahead.add_request(i, request(None))
    ended = run(ahead)
    for i in range(3):
        error = ended["torn", i].error
        assert error is not None
        assert error.code is ErrorCode.ADAPTER_UNAVAILABLE
        assert ended[i].error is None
