"""A model shared by several processes: transformers + PEFT judge it, one process is beside it, and ranks are killed."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from uuid import UUID

import psutil
import pytest
import tiny
import torch
from test_judge import PAGE_BYTES_F32, assert_judged, mixed_requests
from test_process import Shell, has, item

from medley.spec.base_models import read_base_model
from medley.spec.wire import AdapterRef, Add, EngineConfig, Finished, Ready, Running
from medley_worker import Completion, Engine, Request, SamplingParams
from medley_worker.engine.adapters import AdapterCache, AdapterUnavailable
from medley_worker.engine.parallel import followers as followers_module
from medley_worker.engine.parallel.followers import Followers, RankDied
from medley_worker.models import load_model
from medley_worker.models.sharding import shard_of

DEADLINE_S = 120.0  # a busy machine


def load(model_dir: Path, adapters: dict[str, Path], num_ranks: int, **options: object) -> Engine:
    fields = {"max_num_seqs": 8, "max_model_len": 96, "max_num_batched_tokens": 24, "adapter_slots": 1} | options
    engine = Engine.load(model_dir, tensor_parallel=num_ranks, **fields)  # type: ignore[arg-type]
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    return engine


def assert_close(found: Sequence[Completion], wanted: Sequence[Completion]) -> None:
    """Of greedy runs in float32: the same tokens, and log-probabilities but for the order of sums."""
    for one, two in zip(found, wanted, strict=True):
        assert one.error is None
        assert one.token_ids == two.token_ids
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(two.logprobs), rtol=0, atol=1e-4)


def pids_of(engine: Engine) -> list[int]:
    ranks = engine._parts.ranks
    assert ranks is not None
    return ranks.followers.pids


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.02)


def step_on(engine: Engine) -> None:
    """Until it raises, or the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while engine.has_work and time.monotonic() < deadline:
        engine.step()


@pytest.mark.parametrize("kind", list(tiny.MODELS))
def test_two_ranks_say_what_the_judge_says_of_each_adapter_alone(kind: str, tmp_path: Path) -> None:
    """Ranks from 1 to 128 on all sites, in a mixed batch, with chunks, preemption and eviction."""
    model_dir = tiny.make_model(kind, tmp_path / "model")
    adapters = tiny.make_adapters(model_dir, tmp_path)
    shape = tiny.MODELS[kind]()
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    page_bytes = PAGE_BYTES_F32 * shape.num_hidden_layers * shape.num_key_value_heads // 2 * head_dim
    engine = load(model_dir, adapters, 2, kv_cache_bytes=9 * page_bytes)
    requests = mixed_requests(adapters)
    completions = engine.generate(requests)
    engine.check_integrity()
    stats = engine.stats()
    engine.close()
    assert stats.preemptions > 0
    assert stats.adapter_evictions > 0
    assert stats.num_devices == 2
    judge = tiny.Judge(model_dir, adapters)
    for request, completion in zip(requests, completions, strict=True):
        prompt = list(request.prompt_token_ids)
        assert request.adapter is None or isinstance(request.adapter, str)
        logits = judge.logits([*prompt, *completion.token_ids], request.adapter)
        assert_judged(logits[len(prompt) - 1 : -1], completion)


def test_four_ranks_share_two_heads_of_keys(tiny_model: Path, tiny_adapters: dict[str, Path]) -> None:
    requests = mixed_requests(tiny_adapters)[:12]
    alone, shared = (load(tiny_model, tiny_adapters, n) for n in (1, 4))
    wanted = alone.generate(requests)
    assert_close(shared.generate(requests), wanted)
    alone.close()
    shared.close()


def test_draws_scores_and_alternatives_are_those_of_one_process(
    tiny_model: Path, tiny_adapters: dict[str, Path]
) -> None:
    """Tokens are drawn on rank 0 alone, so every field of sampling is at work there as it ever was."""
    rng = random.Random(5)
    names = [None, *tiny_adapters]
    requests = [
        Request(
            tiny.prompt(rng.randint(2, 40), i),
            names[i % len(names)],
            SamplingParams(max_tokens=12, ignore_eos=True, temperature=rng.choice([0.0, 0.8]), seed=i, top_logprobs=2),
        )
        for i in range(14)
    ]
    requests += [Request(tiny.prompt(30, i), names[i], SamplingParams(), num_continuation=9) for i in range(4)]
    alone, shared = (load(tiny_model, tiny_adapters, n) for n in (1, 2))
    wanted = alone.generate(requests)
    assert_close(shared.generate(requests), wanted)
    alone.close()
    shared.close()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rows_bits_depend_on_no_neighbour(num_ranks: int, tiny_model: Path, tiny_adapters: dict[str, Path]) -> None:
    """Sums have one order, whatever else is in them: in float32 on CPU a row is bit-equal alone and in company."""
    requests = mixed_requests(tiny_adapters)[:9]
    engine = load(tiny_model, tiny_adapters, num_ranks, adapter_slots=4)
    together = engine.generate(requests)
    alone = [engine.generate([request])[0] for request in requests]
    engine.close()
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.logprobs for c in together] == [c.logprobs for c in alone]


def test_a_name_used_again_and_a_revision_that_is_no_more_leave_every_rank(
    tiny_model: Path, tiny_adapters: dict[str, Path]
) -> None:
    """A rank that kept what it had packed of the first would answer with it."""
    alone, shared = (load(tiny_model, {}, n) for n in (1, 2))
    ref = AdapterRef(UUID(int=1), UUID(int=2), str(tiny_adapters["rank8"]))
    for engine in (alone, shared):
        for name in ("rank8", "rank16_rslora"):
            engine.add_adapter("it", tiny_adapters[name])
            answers = engine.generate(
                [Request(tiny.prompt(7, i), "it", SamplingParams(max_tokens=8, ignore_eos=True)) for i in range(3)]
            )
            engine.remove_adapter("it")
        engine.generate([Request(tiny.prompt(5), ref, SamplingParams(max_tokens=4))])
        engine.forget([ref])
        engine.check_integrity()
        if engine is alone:
            wanted = answers
    assert_close(answers, wanted)
    alone.close()
    shared.close()


def test_random_weights_are_one_model_on_any_number_of_ranks(tiny_model: Path) -> None:
    whole = load_model(tiny_model, load_format="random", seed=3)
    parts = [load_model(tiny_model, load_format="random", seed=3, rank=r, num_ranks=2) for r in range(2)]
    down = [layer.down for layer in whole._weights.layers]
    shared = zip(*(part._weights.layers for part in parts), strict=True)
    assert all(torch.equal(torch.cat([a.down, b.down]), d) for d, (a, b) in zip(down, shared, strict=True))
    assert parts[1]._weights.embedding is None
    assert parts[1]._weights.lm_head is None


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(3, r"num_attention_heads \(4\).*intermediate_size \(88\).*num_key_value_heads \(2\)"), (0, "1 or more")],
)
def test_a_number_of_ranks_that_does_not_divide_is_refused_with_every_reason(
    size: int, wanted: str, tiny_model: Path
) -> None:
    with pytest.raises(ValueError, match=f"tensor_parallel: got {size}.*{wanted}"):
        Engine.load(tiny_model, tensor_parallel=size)


def test_what_a_rank_cannot_build_is_said_by_name(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Engine.load(tmp_path, tensor_parallel=2)
    with pytest.raises(ValueError, match="forward null"):
        Engine(EngineConfig(model_dir=str(tiny_model), forward="null", tensor_parallel=2))
    assert not _ranks_of(os.getpid())


def _ranks_of(pid: int) -> list[int]:
    children = psutil.Process(pid).children(recursive=True)
    return [c.pid for c in children if "medley_worker.engine.parallel.process" in _command(c.pid)]


def _command(pid: int) -> list[str]:
    try:
        process = psutil.Process(pid)
        return process.cmdline() if process.status() != psutil.STATUS_ZOMBIE else []
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("is_running", [True, False])
def test_a_rank_that_dies_is_named_and_the_engine_can_be_closed(is_running: bool, tiny_model: Path) -> None:
    engine = load(tiny_model, {}, 2)
    sampling = SamplingParams(max_tokens=80, ignore_eos=True)
    if is_running:
        for i in range(4):
            engine.add_request(i, Request(tiny.prompt(6, i), None, sampling))
        engine.step()
    os.kill(pids_of(engine)[0], signal.SIGKILL)
    if not is_running:
        ranks = engine._parts.ranks
        assert ranks is not None
        followers = ranks.followers
        wait_until(lambda: followers.death is not None, "the death is noticed")
        engine.add_request("later", Request(tiny.prompt(6), None, sampling))
    with pytest.raises(RankDied, match="rank 1 was ended by signal 9"):
        step_on(engine)
    others = pids_of(engine)
    engine.close()
    engine.close()
    assert not any(_command(pid) for pid in others)


class FailingRanks:
    """`OtherRanks` of which one cannot have an adapter, once."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []
        self.reason: str | None = "gone (rank 1)"

    def fetch(self, number: int, path: Path) -> None:
        assert path.is_dir()
        self.said.append(("fetch", number))

    def fetched(self, number: int) -> str | None:
        assert self.said[-1] == ("fetch", number)
        reason, self.reason = self.reason, None
        return reason

    def unfetch(self, number: int) -> None:
        self.said.append(("unfetch", number))

    def place(self, number: int, load_id: int, tiles: Sequence[int]) -> None:
        assert load_id >= 0
        assert len(set(tiles)) == len(tiles) > 0
        self.said.append(("place", number))

    def release(self, number: int) -> None:
        self.said.append(("release", number))

    def drop(self, number: int) -> None:
        self.said.append(("drop", number))

    def set_line(self, line: Sequence[tuple[int, Path]]) -> None:
        raise AssertionError(f"nothing is read ahead on a CPU: {line}")


def test_an_adapter_that_one_rank_cannot_have_is_nobodys(tiny_model: Path, tiny_adapters: dict[str, Path]) -> None:
    others = FailingRanks()
    model = read_base_model(tiny_model)
    shard = shard_of(model, size=2)
    cache = AdapterCache(model, num_tiles=64, dtype=torch.float32, shard=shard, others=others)
    key = ("t", "1")
    cache.register(key, tiny_adapters["rank8"])
    with pytest.raises(AdapterUnavailable, match="rank 1"):
        cache.load(key)
    cache.check_integrity()
    assert (cache.is_resident(key), cache.tiles_used) == (False, 0)
    cache.load(key)
    cache.forget(key)
    cache.register(key, tiny_adapters["rank8"])
    cache.load(key)
    cache.check_integrity()
    first, second = 0, 1  # what is known again is another adapter to the other ranks
    assert others.said == [
        ("fetch", first),
        ("unfetch", first),
        ("fetch", first),
        ("place", first),
        ("release", first),
        ("drop", first),
        ("fetch", second),
        ("place", second),
    ]


def test_files_that_are_gone_fail_their_jobs_alone(
    tiny_model: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Their headers were read before; packing fails on every rank, each in its turn."""
    gone = tiny.copy_adapter(tiny_adapters["rank8"], tmp_path / "gone", seed=1)
    engine = load(tiny_model, {"rank8": tiny_adapters["rank8"], "gone": gone}, 2)
    (gone / "adapter_model.safetensors").unlink()
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    bad, good = engine.generate([Request(tiny.prompt(5), name, sampling) for name in ("gone", "rank8")])
    assert bad.error is not None
    assert good.error is None
    engine.check_integrity()
    engine.close()


@pytest.fixture
def shell(tiny_model: Path) -> Iterator[Shell]:
    made = Shell(EngineConfig(model_dir=str(tiny_model), max_num_seqs=4, max_model_len=512, tensor_parallel=2))
    made.listen(has(Ready), DEADLINE_S)
    yield made
    made.close()


def test_an_engine_process_dies_with_any_of_its_ranks(shell: Shell) -> None:
    (rank,) = _ranks_of(shell.process.pid)
    shell.send(Add((item(max_tokens=400),)))
    shell.listen(has(Running))
    os.kill(rank, signal.SIGKILL)
    assert shell.process.wait(DEADLINE_S) == 137


def test_ranks_die_with_their_engine_process(shell: Shell) -> None:
    (rank,) = _ranks_of(shell.process.pid)
    shell.send(Add((item(), item(max_tokens=400))))
    shell.listen(has(Finished))
    shell.process.kill()
    shell.process.wait(DEADLINE_S)
    wait_until(lambda: not _command(rank), "the rank has ended")


def test_a_frozen_rank_is_a_dead_one_before_long(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers_module, "BEAT_S", 2.5)
    engine = load(tiny_model, {}, 2)
    for i in range(4):
        engine.add_request(i, Request(tiny.prompt(6), None, SamplingParams(max_tokens=80, ignore_eos=True)))
    engine.step()
    os.kill(pids_of(engine)[0], signal.SIGSTOP)
    with pytest.raises(RankDied, match="rank 1 said nothing for 15 s"):
        step_on(engine)
    engine.close()


def test_a_frozen_rank_is_ended_when_the_engine_is_closed(tiny_model: Path) -> None:
    engine = load(tiny_model, {}, 2)
    (pid,) = pids_of(engine)
    os.kill(pid, signal.SIGSTOP)
    engine.close()
    assert not psutil.pid_exists(pid)


def test_followers_that_cannot_start_raise(tmp_path: Path) -> None:
    config = EngineConfig(model_dir=str(tmp_path / "nowhere"), tensor_parallel=2)
    followers = Followers(config)
    with pytest.raises(ValueError, match=r"rank 1.*nowhere"):
        followers.await_loaded()
    followers.close()
