"""A model on two GPUs: as close to float32 as transformers + PEFT on one, beside ours on one, and when a rank dies."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import cuda_models
import pytest
import torch
from cuda_models import Tiny, load_engine, prompt

from medley_worker import Completion, Engine, Request, SamplingParams
from medley_worker.engine.parallel.followers import RankDied

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs here"),
]

NUM_NEW = 60
LENGTHS = (1, 15, 16, 33, 64, 130)
Report = Callable[[str], None]


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
def test_two_gpus_are_as_close_to_float32_as_transformers_and_peft_on_one(
    kind: str, tmp_path: Path, report: Report
) -> None:
    """In a mixed batch, prompts cut into chunks, adapters evicted."""
    made = cuda_models.make(kind, tmp_path)
    requests = requests_of(made, 27)
    options = {"max_num_seqs": 16, "max_model_len": 256, "max_num_batched_tokens": 96, "adapter_slots": 2}
    one, two = load_engine(made, **options), load_engine(made, tensor_parallel=2, **options)
    alone, shared = one.generate(requests), two.generate(requests)
    two.check_integrity()
    assert two.stats().adapter_evictions > 0
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
    ours, one_gpu = errors(shared, exact), errors(alone, ours_alone)
    peers = (torch.cat(theirs) - torch.cat(exact)).abs()
    report(
        f"{kind}: {len(ours)} tokens, log-probability error on two GPUs mean {ours.mean():.4f}, p99"
        f" {ours.quantile(0.99):.4f}; on one {one_gpu.mean():.4f}, {one_gpu.quantile(0.99):.4f}; transformers + PEFT"
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


def test_draws_scores_and_invariance_are_there_on_two_gpus(tmp_path: Path) -> None:
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
