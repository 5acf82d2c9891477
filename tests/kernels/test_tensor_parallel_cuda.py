"""A model of two ranks: as close to float32 as transformers + PEFT, beside one rank, asleep, and when a rank dies.

On two GPUs over NCCL, where there are two; else both on one (one_gpu.py says what differs then).
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import cuda_models
import one_gpu
import pytest
import torch
from cuda_models import Tiny, load_engine, prompt

from medley_worker import Completion, Engine, Request, SamplingParams
from medley_worker.engine.parallel.followers import RankDied

pytestmark = pytest.mark.gpu

NUM_NEW = 60
LENGTHS = (1, 15, 16, 33, 64, 130)
Report = Callable[[str], None]


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the two ranks are."""
    if torch.cuda.device_count() > 1:
        return "two GPUs"
    one_gpu.share_it(monkeypatch)
    return "one GPU"


def requests_of(made: Tiny, num_jobs: int, seed: int = 0) -> list[Request]:
    rng = random.Random(seed)
    sampling = SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)
    return [
        Request(prompt(rng.choice(LENGTHS), rng.randrange(10**6)), made.names[i % len(made.names)], sampling)
        for i in range(num_jobs)
    ]


def errors(completions: list[Completion], wanted: list[torch.Tensor]) -> torch.Tensor:
    found = torch.cat([torch.tensor(completion.logprobs) for completion in completions])
    return (found - torch.cat(wanted)).abs()


@pytest.mark.parametrize("kind", list(cuda_models.KINDS))
def test_two_ranks_are_as_close_to_float32_as_transformers_and_peft(
    kind: str, places: str, tmp_path: Path, report: Report
) -> None:
    """In a mixed batch, prompts cut into chunks."""
    made = cuda_models.make(kind, tmp_path)
    requests = requests_of(made, 27)
    options = {"max_num_seqs": 16, "max_model_len": 256, "max_num_batched_tokens": 96, "adapter_slots": 2}
    one, two = load_engine(made, **options), load_engine(made, tensor_parallel=2, **options)
    alone, shared = one.generate(requests), two.generate(requests)
    two.check_integrity()
    one.close()
    two.close()
    judge, peer = cuda_models.Peft(made, torch.float32), cuda_models.Peft(made, torch.bfloat16)
    exact, theirs, ours_alone = [], [], []
    for request, completion, other in zip(requests, shared, alone, strict=True):
        assert completion.error is None
        tokens = torch.tensor(completion.token_ids)[:, None]
        exact.append(judge.logprobs(request, completion.token_ids).gather(1, tokens)[:, 0])
        theirs.append(peer.logprobs(request, completion.token_ids).gather(1, tokens)[:, 0])
        tokens = torch.tensor(other.token_ids)[:, None]
        ours_alone.append(judge.logprobs(request, other.token_ids).gather(1, tokens)[:, 0])
    ours, one_rank = errors(shared, exact), errors(alone, ours_alone)
    peers = (torch.cat(theirs) - torch.cat(exact)).abs()
    report(
        f"{kind}: {len(ours)} tokens, log-probability error of two ranks on {places} mean {ours.mean():.4f}, p99"
        f" {ours.quantile(0.99):.4f}; of one {one_rank.mean():.4f}, {one_rank.quantile(0.99):.4f}; transformers + PEFT"
        f" {peers.mean():.4f}, {peers.quantile(0.99):.4f}"
    )
    assert ours.mean() <= 2 * peers.mean()
    assert ours.quantile(0.99) <= 2 * peers.quantile(0.99)
    cuda_models.assert_same_but_for_ties(shared, alone)


def step_for(engine: Engine, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        engine.step()


@pytest.fixture
def shared(tmp_path: Path) -> Engine:
    made = cuda_models.make("llama3", tmp_path)
    return load_engine(made, tensor_parallel=2, max_num_seqs=16, max_model_len=256, adapter_slots=8)


def test_draws_scores_and_invariance_are_there_with_two_ranks(tmp_path: Path) -> None:
    made = cuda_models.make("llama3", tmp_path)
    engine = load_engine(
        made, tensor_parallel=2, max_num_seqs=16, max_model_len=256, adapter_slots=8, batch_invariant=True
    )
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=3, top_logprobs=2, prompt_logprobs=0)
    requests = [Request(prompt(20, i), made.names[i % len(made.names)], sampling) for i in range(12)]
    together = engine.generate(requests)
    alone = [engine.generate([request])[0] for request in requests]
    engine.close()
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.logprobs for c in together] == [c.logprobs for c in alone]


def test_a_rank_that_dies_ends_the_engine_and_hangs_nobody(shared: Engine) -> None:
    sampling = SamplingParams(max_tokens=200, ignore_eos=True)
    for i in range(8):
        shared.add_request(i, Request(prompt(20, i), None, sampling))
    for _ in range(5):
        shared.step()
    ranks = shared._parts.ranks
    assert ranks is not None
    os.kill(ranks.followers.pids[0], signal.SIGKILL)
    with pytest.raises(RankDied, match="rank 1"):
        step_for(shared, 60)
    shared.close()


def test_two_ranks_sleep_and_wake_together_and_say_the_same(tmp_path: Path, places: str, report: Report) -> None:
    made = cuda_models.make("llama3", tmp_path)
    engine = load_engine(
        made, tensor_parallel=2, max_num_seqs=16, max_model_len=256, adapter_bytes=1 << 30, sleeps=True
    )
    requests = requests_of(made, 16)
    before = engine.generate(requests)
    ranks = engine._parts.ranks
    assert ranks is not None
    assert engine.can_sleep
    for _ in range(2):
        awake, other = engine.device_bytes, ranks.followers.device_bytes
        started = time.monotonic()
        engine.sleep()
        slept = time.monotonic()
        asleep, other_asleep = engine.device_bytes, ranks.followers.device_bytes
        engine.wake()
        report(
            f"two ranks on {places}: asleep in {slept - started:.2f} s, awake in {time.monotonic() - slept:.2f} s; the"
            f" second holds {other / 1e9:.2f} GB awake and {other_asleep / 1e9:.2f} GB asleep"
        )
        assert awake - asleep > 2 * (1 << 30), "each rank has 1 GiB for adapters"
        assert other - other_asleep > 1 << 30
        after = engine.generate(requests)
        cuda_models.assert_same_but_for_ties(after, before)  # adapters come again, in other steps
        engine.check_integrity()
    engine.close()
