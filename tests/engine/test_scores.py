"""Log-probabilities of prompts, continuations and alternatives: those of transformers + PEFT, in any company."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from medley.spec.errors import ErrorCode
from medley.spec.jobs import Details, FinishReason
from medley_worker import Completion, Engine, Refused, Request, RequestOutput, SamplingParams
from medley_worker.engine import requests
from medley_worker.ops.scoring import best_tokens, score

ATOL = 1e-4
PAGE_BYTES = 2 * 32 * 4 * 2 * 2 * 16  # of tiny's llama3: k and v, tokens, float32, layers, heads, head size


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tiny_adapters: dict[str, Path]) -> Iterator[Engine]:
    """Room for everything."""
    made = Engine.load(tiny_model, max_num_seqs=16, max_model_len=128, adapter_slots=8)
    for name, folder in tiny_adapters.items():
        made.add_adapter(name, folder)
    yield made
    made.close()


def crowded(model_dir: Path, adapters: dict[str, Path], max_num_batched_tokens: int) -> Engine:
    """Chunked prompts, preemptions and evictions."""
    made = Engine.load(
        model_dir,
        max_num_seqs=6,
        max_model_len=128,
        max_num_batched_tokens=max_num_batched_tokens,
        kv_cache_bytes=6 * PAGE_BYTES,
        adapter_slots=1,
    )
    for name, folder in adapters.items():
        made.add_adapter(name, folder)
    return made


def random_request(rng: random.Random, adapter: str | None) -> Request:
    """A scoring job, a prompt to be scored, a generation with alternatives, or a plain one."""
    prompt = tiny.prompt(rng.choice([2, 3, 17, 33, 60]), rng.randrange(1000))
    top, prompt_top = rng.choice([0, 1, 5, 20]), rng.choice([None, 0, 3])
    kind = rng.choice(["score", "score", "echo", "draw", "draw", "draw", "plain"])
    if kind == "score":
        num_continuation = rng.randint(1, len(prompt) - 1)
        return Request(prompt, adapter, SamplingParams(top_logprobs=top, prompt_logprobs=prompt_top), num_continuation)
    max_tokens, temperature, seed = rng.choice([1, 60, 60]), rng.choice([0.0, 1.0]), rng.randrange(2**40)
    if kind == "plain":
        top, prompt_top = 0, None
    if kind == "echo":
        max_tokens, prompt_top = 0, rng.choice([0, 5])
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        top_logprobs=top,
        prompt_logprobs=prompt_top,
        ignore_eos=True,
    )
    return Request(prompt, adapter, sampling)


def run(engine: Engine) -> list[RequestOutput]:
    """The ends of all that is in flight."""
    ended = []
    while engine.has_work:
        ended += [output for output in engine.step() if output.is_finished]
    return ended


def assert_judged(judge: tiny.Judge, request: Request, completion: Completion | RequestOutput) -> None:
    """Every log-probability is the judge's, alternatives are its best, and is_greedy says what its argmax says."""
    assert completion.error is None
    prompt = list(request.prompt_token_ids)
    assert request.adapter is None or isinstance(request.adapter, str)
    split = len(prompt) - request.num_continuation
    drawn = [] if request.num_continuation else list(completion.token_ids)
    logprobs = torch.log_softmax(judge.logits([*prompt, *drawn], request.adapter), -1)  # [n, V]
    # After the split: of the continuation, or of what was generated.
    rows = logprobs[split - 1 : len(prompt) + len(drawn) - 1]
    tokens = torch.tensor([*prompt[split:], *drawn])
    assert list(completion.token_ids) == tokens.tolist()
    assert_close(completion.logprobs, rows.gather(1, tokens[:, None])[:, 0] if len(tokens) else torch.zeros(0))
    details, sampling = completion.details, request.sampling
    if not (request.num_continuation or sampling.top_logprobs or sampling.prompt_logprobs is not None):
        assert details is None
        return
    assert details is not None
    assert_best(details.top_token_ids, details.top_logprobs, rows, sampling.top_logprobs)
    if request.num_continuation:
        assert details.is_greedy == bool((rows.argmax(-1) == tokens).all())
    if sampling.prompt_logprobs is None:
        assert details.prompt_logprobs is None
        return
    assert details.prompt_token_ids == tuple(prompt[:split])
    before = logprobs[: split - 1]
    wanted = before.gather(1, torch.tensor(prompt[1:split], dtype=torch.int64)[:, None])[:, 0]
    assert_close(details.prompt_logprobs or (), wanted)
    assert_best(details.prompt_top_token_ids, details.prompt_top_logprobs, before, sampling.prompt_logprobs)


def assert_close(got: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(list(got), dtype=torch.float32), wanted, rtol=0, atol=ATOL)


def assert_best(ids: Any, logprobs: Any, rows: torch.Tensor, k: int) -> None:
    assert len(ids) == len(logprobs) == len(rows) * k
    if len(ids) == 0:
        return
    token_ids = torch.tensor(ids).reshape(len(rows), k)
    assert_close(logprobs, rows.topk(k).values.flatten())
    assert_close(logprobs, rows.gather(1, token_ids).flatten())
    assert all(len(set(row)) == k for row in token_ids.tolist())


@pytest.mark.parametrize("kind", ["llama3", "mistral", "qwen3"])
def test_every_log_probability_is_the_judges_through_chunks_preemptions_and_mixed_batches(
    kind: str, tmp_path: Path
) -> None:
    model_dir = tiny.make_model(kind, tmp_path / "model")
    specs = {name: tiny.MIXED_ADAPTERS[name] for name in ("rank8", "rank128", "patterns")}
    adapters = tiny.make_adapters(model_dir, tmp_path, specs)
    rng = random.Random(len(kind))
    requests = [random_request(rng, name) for name in [None, *adapters] * 8]
    engine = Engine.load(
        model_dir,
        max_num_seqs=8,
        max_model_len=128,
        max_num_batched_tokens=24,  # prompts are cut into chunks
        kv_cache_bytes=(2 if kind == "qwen3" else 1) * 6 * PAGE_BYTES,
        adapter_slots=1,
    )
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    completions = engine.generate(requests)
    engine.check_integrity()
    stats = engine.stats()
    engine.close()
    assert stats.preemptions > 0
    assert stats.adapter_evictions > 0
    judge = tiny.Judge(model_dir, adapters)
    for request, completion in zip(requests, completions, strict=True):
        assert_judged(judge, request, completion)


@pytest.mark.parametrize("seed", range(2))
def test_company_changes_no_bit_of_a_score(
    seed: int, engine: Engine, tiny_model: Path, tiny_adapters: dict[str, Path]
) -> None:
    """Random arrivals, aborts, releases with resumption: scores and alternatives as if alone."""
    rng = random.Random(seed)
    names = [None, "rank1", "rank8", "rank12_attention"]
    requests = {i: random_request(rng, names[i % len(names)]) for i in range(24)}
    other = crowded(tiny_model, tiny_adapters, rng.choice([7, 40]))
    answers: dict[object, RequestOutput] = {}
    arriving, aborted = list(requests), set[object]()
    while arriving or other.has_work:
        action = rng.random()
        if arriving and action > 0.6:
            index = arriving.pop()
            other.add_request(index, requests[index], priority=rng.choice([0, 0, 1]), stream=rng.random() < 0.5)
        elif action < 0.01:
            index = rng.choice(list(requests))
            if index not in arriving and index not in answers:
                other.abort([index])
                aborted.add(index)
        elif action < 0.05:
            for key, checkpoint in other.release([rng.randrange(24)]).items():
                assert isinstance(key, int)
                other.add_request(key, requests[key], checkpoint)
        else:
            answers |= {o.request_id: o for o in other.step() if o.is_finished}
        other.check_integrity()
    assert other.stats().preemptions > 0
    assert set(answers) == set(requests) - aborted
    for index, answer in answers.items():
        assert isinstance(index, int)
        (alone,) = engine.generate([requests[index]])
        assert list(answer.token_ids) == alone.token_ids
        assert list(answer.logprobs) == alone.logprobs
        assert answer.details == alone.details
        assert answer.finish_reason == alone.finish_reason
    other.close()


def test_a_scoring_job_draws_nothing_and_leaves_nothing_behind(engine: Engine) -> None:
    before = engine.stats().generated_tokens
    prompt = tiny.prompt(20)
    score, echo = engine.generate(
        [
            Request(prompt, "rank8", SamplingParams(), num_continuation=4),
            Request(prompt, "rank8", SamplingParams(max_tokens=0, prompt_logprobs=0)),
        ]
    )
    assert (score.token_ids, score.finish_reason) == (list(prompt[16:]), FinishReason.SCORED)
    assert (echo.token_ids, echo.logprobs, echo.finish_reason) == ([], [], FinishReason.LENGTH)
    assert score.details is not None
    assert echo.details is not None
    assert echo.details.prompt_logprobs is not None
    assert echo.details.prompt_logprobs[15:] == tuple(score.logprobs)
    assert engine.stats().generated_tokens == before
    engine.check_integrity()
    assert not engine.has_work


def test_the_greedy_continuation_is_found_to_be_greedy_and_another_is_not(engine: Engine) -> None:
    prompt = tiny.prompt(9)
    (drawn,) = engine.generate([Request(prompt, None, SamplingParams(max_tokens=12, ignore_eos=True))])
    whole = [*prompt, *drawn.token_ids]
    other = [*whole[:-1], (whole[-1] + 1) % tiny.VOCAB]
    scored = engine.generate([Request(ids, None, SamplingParams(), num_continuation=12) for ids in (whole, other)])
    assert [s.details and s.details.is_greedy for s in scored] == [True, False]
    assert scored[0].logprobs == pytest.approx(drawn.logprobs, abs=1e-5)


def test_a_prompt_of_one_token_has_nothing_to_score_and_one_as_long_as_the_model_has(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "MAX_DETAILS", 5_000)
    only = SamplingParams(max_tokens=0, prompt_logprobs=5)
    short, full = engine.generate([Request([5], None, only), Request(tiny.prompt(128), None, only)])
    assert short.details == Details(prompt_token_ids=(5,), prompt_logprobs=())
    assert full.details is not None
    assert full.details.prompt_logprobs is not None
    assert len(full.details.prompt_logprobs) == 127
    for request, code in (
        (Request(tiny.prompt(129), None, only), ErrorCode.PROMPT_TOO_LONG),
        (Request(tiny.prompt(5), None, SamplingParams(), num_continuation=5), ErrorCode.INVALID_TOKEN),
        (Request(tiny.prompt(5), None, SamplingParams(max_tokens=0)), ErrorCode.ENGINE),
        (
            Request(tiny.prompt(100), None, SamplingParams(prompt_logprobs=20, top_logprobs=20)),
            ErrorCode.PROMPT_TOO_LONG,
        ),
    ):
        with pytest.raises(Refused) as caught:
            engine.add_request("bad", request)
        assert caught.value.error.code is code


def test_streamed_details_are_the_details_of_the_end(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=9, ignore_eos=True, top_logprobs=2, prompt_logprobs=1)
    engine.add_request("a", Request(tiny.prompt(5), "rank8", sampling), stream=True)
    ids: list[int] = []
    prompts = []
    while engine.has_work:
        for output in engine.step():
            assert output.details is not None
            if not output.is_finished:
                ids += output.details.top_token_ids
                prompts.append(output.details.prompt_logprobs)
            last = output.details
    assert last.top_token_ids[: len(ids)] == tuple(ids)
    assert len(last.top_token_ids) == 18
    assert prompts[0] == last.prompt_logprobs is not None
    assert set(prompts[1:]) == {None}


def test_a_release_keeps_what_was_found_and_does_not_score_it_again(engine: Engine) -> None:
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, top_logprobs=3, prompt_logprobs=2)
    request = Request(tiny.prompt(30), "rank8", sampling)
    (whole,) = engine.generate([request])
    engine.add_request("a", request)
    for _ in range(5):
        engine.step()
    kept = engine.release()["a"]
    assert kept.details is not None
    assert whole.details is not None
    assert kept.details.prompt_logprobs == whole.details.prompt_logprobs
    assert len(kept.details.top_token_ids) == 3 * len(kept.token_ids)
    # Tokens without their alternatives are drawn again.
    engine.add_request("bare", request, type(kept)(token_ids=kept.token_ids, logprobs=kept.logprobs))
    (bare,) = run(engine)
    assert (list(bare.token_ids), bare.details) == (whole.token_ids, whole.details)
    # Other numbers than the model would give show that they are kept.
    marked = tuple(-float(i) for i in range(29))
    details = Details(
        top_token_ids=kept.details.top_token_ids,
        top_logprobs=kept.details.top_logprobs,
        prompt_token_ids=kept.details.prompt_token_ids,
        prompt_logprobs=marked,
        prompt_top_token_ids=kept.details.prompt_top_token_ids,
        prompt_top_logprobs=kept.details.prompt_top_logprobs,
    )
    engine.add_request("b", request, type(kept)(token_ids=kept.token_ids, logprobs=kept.logprobs, details=details))
    (last,) = run(engine)
    assert last.details is not None
    assert last.details.prompt_logprobs == marked
    assert last.details.top_token_ids == whole.details.top_token_ids
    assert last.details.prompt_top_token_ids == whole.details.prompt_top_token_ids


def test_nan_fails_the_scoring_job_alone(tmp_path: Path, tiny_model: Path, tiny_adapters: dict[str, Path]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_adapters["rank8"] / "adapter_model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    config = (tiny_adapters["rank8"] / "adapter_config.json").read_bytes()
    (tmp_path / "adapter_config.json").write_bytes(config)
    engine = Engine.load(tiny_model, max_num_seqs=4, max_model_len=64)
    engine.add_adapter("huge", tmp_path)
    good = Request(tiny.prompt(9), None, SamplingParams(), num_continuation=3)
    alone, bad = engine.generate([good, Request(tiny.prompt(9), "huge", SamplingParams(), num_continuation=3)])
    assert bad.error is not None
    assert bad.error.code is ErrorCode.NUMERICAL
    assert bad.details is None
    assert engine.generate([good]) == [alone]
    engine.close()


def test_of_equal_logits_the_lower_id_is_better_however_many_are_asked_for() -> None:
    logits = torch.tensor([[0.0, 2.0, -0.0, 2.0, -1.0, 2.0], [-3.0, -3.0, -1.0, -1.0, -1.0, float("-inf")]])
    assert best_tokens(logits, 6).token_ids.tolist() == [[1, 3, 5, 0, 2, 4], [2, 3, 4, 0, 1, 5]]
    for k in range(1, 9):
        wanted = best_tokens(logits, 6).token_ids[:, :k].tolist()
        assert best_tokens(logits, k).token_ids.tolist() == wanted
    scored = score(logits, torch.tensor([1, 3]))
    assert scored.is_best.tolist() == [True, False]
    assert torch.equal(best_tokens(logits, 1).logprobs[0], scored.logprobs[:1])
    random_logits = torch.randn((50, 997), generator=torch.Generator().manual_seed(1))
    best = best_tokens(random_logits, 20)
    np.testing.assert_array_equal(best.token_ids.numpy(), random_logits.topk(20).indices.numpy())
    torch.testing.assert_close(best.logprobs, random_logits.log_softmax(-1).topk(20).values)
