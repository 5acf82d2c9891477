"""Scores, alternatives and guided draws on CUDA: their error beside transformers + PEFT at one dtype, and company."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import cuda_models
import numpy as np
import pytest
import torch
from cuda_models import VOCAB, Tiny, load_engine, prompt

from medley_worker import Completion, Engine, Request, SamplingParams
from medley_worker.ops.sampling import SamplingRow, build_sampling_batch, sample
from medley_worker.ops.scoring import best_tokens, score

pytestmark = pytest.mark.gpu

LENGTHS = (2, 15, 16, 17, 64, 130, 190)
TOP = 5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return cuda_models.make("llama3", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def roomy(llama: Tiny) -> Iterator[Engine]:
    """An engine with memory for everything, whose prompts are cut into chunks."""
    engine = load_engine(llama, max_num_seqs=64, max_model_len=256, max_num_batched_tokens=100, adapter_slots=8)
    yield engine
    engine.close()


def scoring(made: Tiny, num_jobs: int, seed: int = 0) -> list[Request]:
    """Continuations of many lengths after prompts of many lengths, of all adapters and of the base."""
    rng = random.Random(seed)
    sampling = SamplingParams(top_logprobs=TOP, prompt_logprobs=TOP)
    requests = []
    for i in range(num_jobs):
        ids = prompt(rng.choice(LENGTHS), rng.randrange(10**6))
        requests.append(Request(ids, made.names[i % len(made.names)], sampling, rng.randint(1, len(ids) - 1)))
    return requests


def plain(made: Tiny, num_jobs: int) -> list[Request]:
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    return [Request(prompt(20, i), made.names[i % len(made.names)], sampling) for i in range(num_jobs)]


def found(completion: Completion) -> torch.Tensor:
    """[n - 1] the log-probabilities of every token but the first."""
    assert completion.error is None
    assert completion.details is not None
    assert completion.details.prompt_logprobs is not None
    return torch.tensor([*completion.details.prompt_logprobs, *completion.logprobs])


def test_scores_are_as_near_to_float32_as_those_of_transformers_and_peft(llama: Tiny, roomy: Engine) -> None:
    requests = scoring(llama, 48)
    completions = roomy.generate(requests)
    roomy.check_integrity()
    exact, peer = cuda_models.Peft(llama, torch.float32), cuda_models.Peft(llama, torch.bfloat16)
    ours, theirs = [], []
    for request, completion in zip(requests, completions, strict=True):
        first, *rest = request.prompt_token_ids
        whole = Request([first], request.adapter)
        wanted, other = exact.logprobs(whole, rest), peer.logprobs(whole, rest)
        at = torch.tensor(rest)[:, None]
        ours.append((found(completion) - wanted.gather(1, at)[:, 0]).abs())
        theirs.append((other.gather(1, at)[:, 0] - wanted.gather(1, at)[:, 0]).abs())
        details = completion.details
        assert details is not None
        tops = torch.tensor([*details.prompt_top_logprobs, *details.top_logprobs]).reshape(len(rest), TOP)
        ours.append((tops - wanted.topk(TOP).values).abs().flatten())
        theirs.append((other.topk(TOP).values - wanted.topk(TOP).values).abs().flatten())
    mean, peer_mean = float(torch.cat(ours).mean()), float(torch.cat(theirs).mean())
    assert mean <= 2 * peer_mean, f"mean error {mean:.4f}, that of transformers + PEFT {peer_mean:.4f}"


def test_what_was_drawn_greedily_is_the_first_alternative_and_scores_as_it_was_drawn(
    llama: Tiny, roomy: Engine
) -> None:
    sampling = SamplingParams(max_tokens=30, ignore_eos=True, top_logprobs=TOP)
    requests = [Request(prompt(20, i), name, sampling) for i, name in enumerate(llama.names * 2)]
    drawn = roomy.generate([*requests, *plain(llama, 8)])[: len(requests)]
    for completion in drawn:
        assert completion.details is not None
        assert completion.details.top_token_ids[::TOP] == tuple(completion.token_ids)
        np.testing.assert_allclose(completion.details.top_logprobs[::TOP], completion.logprobs, atol=1e-4)
    again = [
        Request([*r.prompt_token_ids, *c.token_ids], r.adapter, SamplingParams(), 30)
        for r, c in zip(requests, drawn, strict=True)
    ]
    for scored, completion in zip(roomy.generate(again), drawn, strict=True):
        assert scored.token_ids == completion.token_ids
        np.testing.assert_allclose(scored.logprobs, completion.logprobs, atol=cuda_models.NEAR_TIE)


def test_plain_rows_are_what_they_are_without_scores_beside_them(llama: Tiny, roomy: Engine) -> None:
    alone = roomy.generate(plain(llama, 16))
    together = roomy.generate([*plain(llama, 16), *scoring(llama, 32, seed=1)])[:16]
    cuda_models.assert_same_but_for_ties(together, alone)
    assert all(completion.details is None for completion in together)


def test_batch_invariant_scores_depend_on_no_neighbour(llama: Tiny) -> None:
    engine = load_engine(llama, max_num_seqs=16, max_model_len=256, adapter_slots=8, batch_invariant=True)
    requests = scoring(llama, 20, seed=2)
    together = engine.generate([*requests, *plain(llama, 8)])[: len(requests)]
    in_another_order = engine.generate(requests[::-1])[::-1]
    alone = [engine.generate([request])[0] for request in requests]
    engine.close()
    assert together == in_another_order == alone


def test_the_scoring_ops_say_the_same_on_both_devices() -> None:
    logits = torch.randn((300, VOCAB), generator=torch.Generator().manual_seed(0)).mul(4).round().div(4)  # many ties
    targets = torch.arange(300) % VOCAB
    wanted, got = score(logits, targets), score(logits.cuda(), targets.cuda())
    torch.testing.assert_close(got.logprobs.cpu(), wanted.logprobs, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.is_best.cpu(), wanted.is_best)
    for k in (1, 20):
        assert torch.equal(best_tokens(logits.cuda(), k).token_ids.cpu(), best_tokens(logits, k).token_ids)


def test_masks_are_kept_to_on_the_device_as_on_the_host() -> None:
    rng = np.random.default_rng(0)
    masks = rng.integers(-(2**31), 2**31, (64, VOCAB // 32), np.int64).astype(np.int32)
    logits = torch.randn((64, VOCAB), generator=torch.Generator().manual_seed(1))
    rows = [
        SamplingRow(SamplingParams(temperature=float(i % 2), top_p=0.9), i, 5, (), (), allowed=masks[i])
        for i in range(64)
    ]
    wanted = sample(logits, build_sampling_batch(rows, VOCAB)).token_ids
    got = sample(logits.cuda(), build_sampling_batch(rows, VOCAB, torch.device("cuda"))).token_ids.cpu()
    assert torch.equal(got, wanted)
    assert all(masks[i, token // 32] >> (token % 32) & 1 for i, token in enumerate(got.tolist()))


def test_guided_rows_match_their_grammar_beside_rows_that_run_ahead(llama: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    made = Tiny(cuda_models.with_byte_tokenizer(llama.model_dir, tmp_path / "model"), llama.adapters)
    engine = load_engine(made, max_num_seqs=32, max_model_len=256, adapter_slots=8)
    sampling = [SamplingParams(max_tokens=60, temperature=1.0, seed=i, regex="[0-9]{3}-(ab|c{4})") for i in range(24)]
    guided = [Request(prompt(9, i), made.names[i % len(made.names)], s) for i, s in enumerate(sampling)]
    alone = engine.generate(plain(made, 16))
    together = engine.generate([*guided, *plain(made, 16)])
    engine.close()
    for completion in together[:24]:
        assert completion.error is None
        text = bytes(token - 3 for token in completion.token_ids[:-1]).decode()
        assert re.fullmatch("[0-9]{3}-(ab|c{4})", text), text
    cuda_models.assert_same_but_for_ties(together[24:], alone)
