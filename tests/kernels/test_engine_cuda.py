"""The engine on CUDA: its error beside that of transformers + PEFT at one dtype, company, pressure, ends, draws."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_models
import pytest
import torch
from cuda_models import VOCAB, Tiny, assert_same_but_for_ties, load_engine, prompt

from medley.spec.base_models import read_base_model
from medley.spec.jobs import FinishReason
from medley_worker import Completion, Engine, Request, SamplingParams
from medley_worker.ops.sampling import SamplingRow, build_sampling_batch, sample

pytestmark = pytest.mark.gpu

NUM_NEW = 80
Report = Callable[[str], None]
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 64, 130)
CUDA_PAGE = 16  # tokens of a KV page


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return cuda_models.make("llama3", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def roomy(llama: Tiny) -> Engine:
    """An engine with memory for everything."""
    return load_engine(llama, max_num_seqs=64, max_model_len=256, adapter_slots=8)


def greedy(made: Tiny, num_jobs: int, *, num_new: int = NUM_NEW, seed: int = 0) -> list[Request]:
    """Jobs of all adapters and of the base, prompts of many lengths."""
    rng = random.Random(seed)
    sampling = SamplingParams(max_tokens=num_new, ignore_eos=True)
    names = [made.names[i % len(made.names)] for i in range(num_jobs)]
    rng.shuffle(names)
    return [Request(prompt(rng.choice(LENGTHS), rng.randrange(10**6)), name, sampling) for name in names]


def sampled(requests: list[Request], **params: float) -> list[Request]:
    """The same jobs, drawn with a seed each."""
    sampling = [
        SamplingParams(max_tokens=r.sampling.max_tokens, ignore_eos=True, temperature=1.0, seed=i, **params)  # type: ignore[arg-type]
        for i, r in enumerate(requests)
    ]
    return [Request(r.prompt_token_ids, r.adapter, s) for r, s in zip(requests, sampling, strict=True)]


def summary(errors: torch.Tensor) -> tuple[float, float]:
    """Mean and 99th percentile."""
    return float(errors.mean()), float(errors.quantile(0.99))


@pytest.mark.parametrize("kind", list(cuda_models.KINDS))
def test_logprobs_are_as_close_to_float32_as_those_of_transformers_and_peft(
    kind: str, tmp_path: Path, report: Report
) -> None:
    """Of tokens that our engine took, greedily or drawn, in a mixed batch, prompts cut into chunks."""
    made = cuda_models.make(kind, tmp_path)
    requests = greedy(made, 14) + sampled(greedy(made, 14, seed=1))
    engine = load_engine(made, max_num_seqs=16, max_model_len=256, max_num_batched_tokens=96, adapter_slots=2)
    completions = engine.generate(requests)
    engine.check_integrity()
    engine.close()
    judge, peer = cuda_models.Peft(made, torch.float32), cuda_models.Peft(made, torch.bfloat16)
    ours, theirs, num_best = [], [], 0
    for request, completion in zip(requests, completions, strict=True):
        assert completion.error is None
        assert len(completion.token_ids) == NUM_NEW
        tokens = torch.tensor(completion.token_ids)[:, None]
        exact = judge.logprobs(request, completion.token_ids)
        wanted = exact.gather(1, tokens)[:, 0]
        ours.append((torch.tensor(completion.logprobs) - wanted).abs())
        theirs.append((peer.logprobs(request, completion.token_ids).gather(1, tokens)[:, 0] - wanted).abs())
        if request.sampling.temperature == 0:
            num_best += int((wanted == exact.max(-1).values).sum())
    num_greedy = NUM_NEW * sum(r.sampling.temperature == 0 for r in requests)
    (mean, high), (peer_mean, peer_high) = summary(torch.cat(ours)), summary(torch.cat(theirs))
    report(
        f"{kind}: {len(torch.cat(ours))} tokens, log-probability error mean {mean:.4f}, p99 {high:.4f}; transformers"
        f" + PEFT {peer_mean:.4f}, {peer_high:.4f}; {num_best} of {num_greedy} greedy tokens are float32's"
    )
    assert len(torch.cat(ours)) >= 2000
    assert mean <= 2 * peer_mean
    assert high <= 2 * peer_high


def test_company_parts_a_job_from_its_tokens_only_at_near_ties(llama: Tiny, roomy: Engine, report: Report) -> None:
    requests = greedy(llama, 64, num_new=40)
    together = roomy.generate(requests)
    alone = [roomy.generate([request])[0] for request in requests]
    num_parted = assert_same_but_for_ties(together, alone)
    report(f"{num_parted} of {len(requests)} jobs have other greedy tokens alone than in a batch of 64")


def test_a_run_repeats_bit_by_bit(llama: Tiny, roomy: Engine) -> None:
    requests = greedy(llama, 40, num_new=24) + sampled(greedy(llama, 20, num_new=24, seed=3))
    roomy.generate(requests)  # loads adapters: while one is on its way, steps are made of other rows
    first, second = roomy.generate(requests), roomy.generate(requests)
    for one, other in zip(first, second, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs


def test_too_little_of_everything_changes_no_lengths_and_no_tokens(llama: Tiny, roomy: Engine) -> None:
    """Tiles for one adapter of rank 128, pages for a quarter of the rows, a step budget below most prompts."""
    model = read_base_model(llama.model_dir)
    page_bytes = 2 * CUDA_PAGE * model.num_layers * model.num_kv_heads * model.head_dim * 2
    tight = load_engine(
        llama,
        max_num_seqs=16,
        max_model_len=256,
        max_num_batched_tokens=24,
        kv_cache_bytes=40 * page_bytes,
        adapter_slots=1,
    )
    requests = greedy(llama, 48)
    got = tight.generate(requests)
    tight.check_integrity()
    stats = tight.stats()
    tight.close()
    assert stats.preemptions > 0
    assert stats.adapter_evictions > 0
    assert [len(completion.token_ids) for completion in got] == [NUM_NEW] * len(requests)
    assert {completion.finish_reason for completion in got} == {FinishReason.LENGTH}
    assert_same_but_for_ties(got, roomy.generate(requests))


def test_aborted_and_released_rows_leave_the_others_alone(llama: Tiny, roomy: Engine) -> None:
    """With a step in flight: what was aborted is silent, what was released goes on from its checkpoint."""
    requests = greedy(llama, 24, num_new=40, seed=5)
    wanted = roomy.generate(requests)
    ended: dict[int, Completion] = {}

    def step() -> None:
        for output in roomy.step():
            assert isinstance(output.request_id, int)
            if output.is_finished:
                assert output.request_id not in range(8, 12), "an aborted request was reported"
                ended[output.request_id] = Completion(
                    list(output.token_ids), list(output.logprobs), output.finish_reason, None, output.error
                )

    for index, request in enumerate(requests):
        roomy.add_request(index, request)
    for _ in range(10):
        step()
    roomy.abort(range(8, 12))
    step()
    released = roomy.release(range(8))
    roomy.check_integrity()
    assert set(released) == set(range(8))
    for index, checkpoint in released.items():
        assert isinstance(index, int)
        assert 0 < len(checkpoint.token_ids) < 40
        roomy.add_request(index, requests[index], checkpoint)
    while roomy.has_work:
        step()
    roomy.check_integrity()
    kept = [index for index in range(len(requests)) if index not in range(8, 12)]
    assert sorted(ended) == kept
    assert_same_but_for_ties([ended[i] for i in kept], [wanted[i] for i in kept])


def test_stop_tokens_and_limits_end_a_job_where_they_should(llama: Tiny, roomy: Engine) -> None:
    """A token of a first run is made a stop token of a second: it ends there, also with the next step in flight."""
    requests = greedy(llama, 32, num_new=40, seed=6)
    free = roomy.generate(requests)
    stops = [completion.token_ids[3 + i] for i, completion in enumerate(free)]
    stopping = [
        Request(r.prompt_token_ids, r.adapter, SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(stop,)))
        for r, stop in zip(requests, stops, strict=True)
    ]
    for index, (one, stop, completion) in enumerate(zip(free, stops, roomy.generate(stopping), strict=True)):
        place = cuda_models.first_difference(completion, one)
        if stop in completion.token_ids:
            assert completion.finish_reason is FinishReason.STOP, f"job {index}"
            assert completion.token_ids.index(stop) == len(completion.token_ids) - 1, f"job {index} went on"
            is_prefix = place is None or place == len(completion.token_ids)
        else:
            assert completion.finish_reason is FinishReason.LENGTH, f"job {index}"
            is_prefix = False
        if not is_prefix:
            assert place is not None
            assert abs(completion.logprobs[place] - one.logprobs[place]) < cuda_models.NEAR_TIE, f"job {index}"


def test_rows_that_want_more_than_an_argmax_share_a_step_with_rows_that_do_not(llama: Tiny, roomy: Engine) -> None:
    """Penalties, bias and filters; a penalty needs the token that is still in flight."""
    wanted: list[tuple[dict[str, Any], Callable[[list[int]], bool]]] = [
        ({"logit_bias": {7: 100.0}}, lambda tokens: tokens == [7] * 30),
        # Halved once it was drawn, 7 is behind 8; halved too, 8 is behind it for good.
        ({"logit_bias": {7: 100.0, 8: 75.0}, "repetition_penalty": 2.0}, lambda tokens: tokens == [7, 8, *[7] * 28]),
        # 2 off each time: 7 is drawn until it meets 8.
        ({"logit_bias": {7: 100.0, 8: 80.0}, "frequency_penalty": 2.0}, lambda t: t.count(7) > t.count(8) > 0),
        ({"logit_bias": {7: 100.0}, "temperature": 0.7, "seed": 4}, lambda tokens: tokens == [7] * 30),
        ({"logit_bias": {7: 100.0}, "min_tokens": 9, "stop_token_ids": (7,)}, lambda tokens: tokens.index(7) == 9),
    ]
    plain = greedy(llama, 12, num_new=30, seed=7)
    best = [Request(r.prompt_token_ids, r.adapter, _sampling(temperature=0.7, top_k=1, seed=1)) for r in plain]
    edited = [Request((20, 21, 22), r.adapter, _sampling(**w)) for r, (w, _) in zip(plain, wanted, strict=False)]
    got = roomy.generate([*edited, *plain, *best])
    for completion, (params, holds) in zip(got, wanted, strict=False):
        assert holds(completion.token_ids), f"{params}: {completion.token_ids}"
    num_edited, num_plain = len(edited), len(plain)
    greedy_there, best_there = got[num_edited : num_edited + num_plain], got[num_edited + num_plain :]
    assert_same_but_for_ties(greedy_there, roomy.generate(plain))
    # The best token alone is left to draw from.
    assert_same_but_for_ties(best_there, greedy_there)


def _sampling(**params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=30, ignore_eos=True, **params)


def test_draws_have_the_noise_of_the_cpu_engines(llama: Tiny, roomy: Engine) -> None:
    """The first token of 256 jobs: bfloat16 turns few draws, other noise would turn most."""
    requests = sampled(greedy(llama, 256, num_new=1, seed=8), top_p=0.95)
    cpu = load_engine(llama, device="cpu", dtype="float32", max_num_seqs=64, max_model_len=256, adapter_slots=8)
    wanted = cpu.generate(requests)
    cpu.close()
    got = roomy.generate(requests)
    num_same = sum(a.token_ids == b.token_ids for a, b in zip(got, wanted, strict=True))
    assert num_same >= 0.8 * len(requests), f"{num_same} of {len(requests)} draws are the CPU's"
    in_another_order = roomy.generate(requests[::-1])[::-1]
    num_same = sum(a.token_ids == b.token_ids for a, b in zip(got, in_another_order, strict=True))
    assert num_same >= 0.9 * len(requests), f"{num_same} of {len(requests)} draws are the same in other rows"


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.05, "top_k": 50, "top_p": 0.95},
        {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "logit_bias": {5: 2.0}},
    ],
    ids=lambda params: "-".join(params),
)
def test_the_sampling_op_draws_the_same_tokens_on_both_devices(params: dict[str, object]) -> None:
    logits = torch.randn((512, VOCAB), generator=torch.Generator().manual_seed(0)) * 3
    rows = [
        SamplingRow(SamplingParams(**params), seed, seed % 97, (1, 2, 3), (4, 5, 5, seed % VOCAB))  # type: ignore[arg-type]
        for seed in range(len(logits))
    ]
    wanted = sample(logits, build_sampling_batch(rows, VOCAB))
    got = sample(logits.cuda(), build_sampling_batch(rows, VOCAB, torch.device("cuda")))
    assert torch.equal(got.token_ids.cpu(), wanted.token_ids)
    torch.testing.assert_close(got.logprobs.cpu(), wanted.logprobs, rtol=1e-4, atol=1e-4)
