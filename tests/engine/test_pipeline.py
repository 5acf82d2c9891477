"""Steps launched before the one before is read: the same answers as one after the other, in random company."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from medley.spec.errors import ErrorCode
from medley.spec.jobs import FinishReason
from medley_worker import Completion, Engine, Request, RequestOutput, SamplingParams
from medley_worker.engine import assembly
from medley_worker.engine.forward import DoneTicket, Forward
from medley_worker.engine.plans import Rows, StepPlan
from medley_worker.engine.results import StepResult
from medley_worker.engine.rows import RowTable

NUM_REQUESTS = 18
PAGE_BYTES = 2 * 32 * 4 * 2 * 2 * 16  # of tiny's llama3: k and v, tokens, float32, layers, heads, head size
TILE_BYTES = 4 * 2 * 8 * (64 * 3 + 64 + 2 * 32)  # float32, layers, ranks; q, k and v: in each, and out
STOP = 50  # a token that some requests end with
GAP = 10**9  # stands in token_ids where a token is in flight: no embedding has it


@dataclass
class LateTicket:
    """Hands its result out only in turn."""

    value: StepResult
    line: list[LateTicket] = field(repr=False)

    def result(self) -> StepResult:
        assert self.line.pop(0) is self, "results are read out of turn"
        return self.value


class LateForward:
    """A forward pass of depth 1 over one of depth 0: keeps each row's last token as a device does."""

    depth = 1

    def __init__(self, inner: Forward, rows: RowTable, spoil: Callable[[StepResult], None]) -> None:
        self.inner, self.rows, self.spoil = inner, rows, spoil
        self.last_token = np.full(rows.num_rows, GAP, np.int64)
        self.line: list[LateTicket] = []
        self.num_pending_launches = 0

    def launch(self, plan: StepPlan, sampled: Rows) -> LateTicket:
        assert len(self.line) <= 1, "more steps are in flight than the depth allows"
        rows = self.rows
        pending = plan.decode_rows[rows.is_pending[plan.decode_rows]]
        assert not rows.needs_output[pending].any(), "a draw from output tokens that are in flight"
        assert not any(rows.is_pending[chunk.row] for chunk in plan.chunks)
        self.num_pending_launches += bool(len(pending))
        at = rows.num_tokens[pending] - 1
        rows.token_ids[pending, at] = self.last_token[pending]
        ticket = self.inner.launch(plan, sampled)
        assert isinstance(ticket, DoneTicket)
        rows.token_ids[pending, at] = GAP
        result = ticket.result()
        self.last_token[sampled] = result.token_ids
        self.spoil(result)
        self.line.append(LateTicket(result, self.line))
        return self.line[-1]


def _as_is(result: StepResult) -> None:
    del result


LateEngine = Callable[..., Engine]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_adapters: dict[str, Path]) -> Iterator[LateEngine]:
    """Makes engines of depth 1. spoil: changes what a step's results are before they are handed out."""
    real = assembly.ModelForward
    made: list[Engine] = []

    def make(spoil: Callable[[StepResult], None] = _as_is, only: tuple[str, ...] = (), **sizes: int) -> Engine:
        def wrapped(*parts: object) -> LateForward:
            rows = next(part for part in parts if isinstance(part, RowTable))
            return LateForward(real(*parts), rows, spoil)  # type: ignore[arg-type]

        monkeypatch.setattr(assembly, "ModelForward", wrapped)
        engine = Engine.load(tiny_model, **sizes)  # type: ignore[arg-type]
        for name in only or tiny_adapters:
            engine.add_adapter(name, tiny_adapters[name])
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tiny_adapters: dict[str, Path]) -> Iterator[Engine]:
    """Depth 0, with room for everything."""
    engine = Engine.load(tiny_model, max_num_seqs=16, max_model_len=128, adapter_slots=8)
    for name, folder in tiny_adapters.items():
        engine.add_adapter(name, folder)
    yield engine
    engine.close()


def forward_of(engine: Engine) -> LateForward:
    forward = engine._parts.forward
    assert isinstance(forward, LateForward)
    return forward


def run(engine: Engine) -> dict[object, RequestOutput]:
    ended: dict[object, RequestOutput] = {}
    while engine.has_work:
        ended |= {o.request_id: o for o in engine.step() if o.is_finished}
        engine.check_integrity()
    return ended


def random_request(rng: random.Random, adapter: str | None, *, has_penalties: bool) -> Request:
    sampling = SamplingParams(
        max_tokens=rng.choice([1, 80, 80, 80]),
        temperature=rng.choice([0.0, 0.7, 1.5]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.0, 1.3]) if has_penalties else 1.0,
        logit_bias=rng.choice([{}, {STOP: 3.0}]),
        stop_token_ids=rng.choice([(), (STOP,)]),
        seed=rng.randrange(2**63),
        min_tokens=rng.choice([0, 1]),
        ignore_eos=rng.random() < 0.8,
    )
    return Request(tiny.prompt(rng.choice([1, 8, 20, 31]), rng.randrange(1000)), adapter, sampling)


@pytest.mark.parametrize("seed", range(4))
def test_random_company_gets_the_answers_of_depth_0(seed: int, late: LateEngine, plain: Engine) -> None:
    """Arrivals, aborts, releases with resumption, evictions, preemptions, end tokens, penalties."""
    rng = random.Random(seed)
    adapters = ("rank1", "rank8", "rank12_attention")  # 4, 4 and 2 tiles
    names = [None, *adapters]
    requests = [random_request(rng, names[i % len(names)], has_penalties=seed % 2 == 1) for i in range(NUM_REQUESTS)]
    engine = late(
        only=adapters,
        max_num_seqs=6,
        max_model_len=128,
        max_num_batched_tokens=rng.choice([7, 40]),
        kv_cache_bytes=6 * PAGE_BYTES,
        adapter_bytes=8 * TILE_BYTES,
    )
    answers: dict[object, RequestOutput] = {}
    streams: dict[object, list[int]] = {}
    arriving, aborted = list(range(NUM_REQUESTS)), set[object]()
    while arriving or engine.has_work:
        action = rng.random()
        if arriving and action > 0.6:
            index = arriving.pop()
            is_streamed = rng.random() < 0.5
            engine.add_request(index, requests[index], priority=rng.choice([0, 0, 1]), stream=is_streamed)
            if is_streamed:
                streams[index] = []
        elif action < 0.01:
            index = rng.randrange(NUM_REQUESTS)
            if index not in arriving and index not in answers:
                engine.abort([index])
                aborted.add(index)
        elif action < 0.04:
            keys = None if rng.random() < 0.2 else [rng.randrange(NUM_REQUESTS)]
            for key, checkpoint in engine.release(keys).items():
                assert isinstance(key, int)
                engine.add_request(key, requests[key], checkpoint)
                if key in streams:
                    streams.pop(key)
        else:
            for output in engine.step():
                if output.request_id in streams:
                    streams[output.request_id] += output.new_token_ids
                if output.is_finished:
                    assert output.request_id not in answers, "an end is reported twice"
                    answers[output.request_id] = output
        engine.check_integrity()
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.adapter_evictions > 0
    assert stats.pages_used == stats.num_running == stats.num_waiting == 0
    assert forward_of(engine).num_pending_launches > 20
    assert set(answers) == set(range(NUM_REQUESTS)) - aborted
    wanted = plain.generate(requests)
    for index, answer in answers.items():
        assert isinstance(index, int)
        assert_same(answer, wanted[index])
        assert streams.get(index, list(answer.token_ids)) == list(answer.token_ids)


def assert_same(answer: RequestOutput, wanted: Completion) -> None:
    assert list(answer.token_ids) == wanted.token_ids
    assert answer.finish_reason == wanted.finish_reason
    torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(wanted.logprobs), rtol=0, atol=1e-5)


def test_every_token_is_counted_once_and_a_row_stops_when_its_length_is_known(late: LateEngine) -> None:
    engine = late(max_num_seqs=4, max_model_len=64)
    lengths = [1, 2, 7]
    for i, max_tokens in enumerate(lengths):
        engine.add_request(i, Request(tiny.prompt(5), None, SamplingParams(max_tokens=max_tokens, ignore_eos=True)))
    answers = run(engine)
    assert {i: len(answers[i].token_ids) for i in range(3)} == dict(enumerate(lengths))
    stats = engine.stats()
    assert stats.generated_tokens == sum(lengths)
    assert stats.steps == max(lengths), "a step was launched for rows that had ended by length"
    assert stats.rows == sum(lengths)
    assert stats.prompt_tokens == 15
    assert 0 < stats.host_s <= stats.step_s


def test_a_token_drawn_past_an_end_token_is_dropped_even_if_the_row_has_a_new_owner(
    late: LateEngine, plain: Engine
) -> None:
    engine = late(max_num_seqs=1, max_model_len=64)
    ends = Request(
        tiny.prompt(5), None, SamplingParams(max_tokens=40, logit_bias={STOP: 100.0}, stop_token_ids=(STOP,))
    )
    other = Request(tiny.prompt(7), "rank8", SamplingParams(max_tokens=6, ignore_eos=True))
    for i in range(3):
        engine.add_request(i, ends)
        engine.add_request(("other", i), other, stream=True)
    answers = run(engine)
    (wanted,) = plain.generate([other])
    for i in range(3):
        assert answers[i].token_ids == (STOP,)
        assert answers[i].finish_reason is FinishReason.STOP
        assert_same(answers["other", i], wanted)


def test_an_abort_of_all_leaves_nothing_in_flight(late: LateEngine) -> None:
    engine = late(max_num_seqs=2, max_model_len=64)
    for i in range(2):
        engine.add_request(i, Request(tiny.prompt(5), None, SamplingParams(max_tokens=40, ignore_eos=True)))
    for _ in range(3):
        engine.step()
    engine.abort([0])
    engine.check_integrity()
    assert engine.has_work
    engine.abort([1])
    engine.check_integrity()
    assert not engine.has_work
    assert not forward_of(engine).line


def test_a_release_gives_the_tokens_in_flight_back_too(late: LateEngine, plain: Engine) -> None:
    engine = late(max_num_seqs=2, max_model_len=64)
    long = Request(tiny.prompt(5), "rank12_attention", SamplingParams(max_tokens=20, ignore_eos=True))
    short = Request(tiny.prompt(5), None, SamplingParams(max_tokens=4, ignore_eos=True))
    engine.add_request("long", long, stream=False)
    engine.add_request("short", short, stream=False)
    for _ in range(4):
        assert engine.step() == []
    released = engine.release()
    assert set(released) == {"long"}, "what ends with the tokens in flight is not released"
    assert len(released["long"].token_ids) == 4
    (ended,) = engine.take_outputs()
    assert ended.request_id == "short"
    assert not engine.has_work
    engine.add_request("long", long, released["long"])
    wanted = plain.generate([long, short])
    assert_same(run(engine)["long"], wanted[0])
    assert_same(ended, wanted[1])


def test_nan_fails_its_row_alone_and_the_step_after_it_is_dropped(late: LateEngine, plain: Engine) -> None:
    num_results = 0

    def spoil(result: StepResult) -> None:
        nonlocal num_results
        num_results += 1
        if num_results == 3:
            object.__setattr__(result, "is_bad", np.arange(len(result.token_ids)) == 0)

    engine = late(spoil, max_num_seqs=2, max_model_len=64)
    request = Request(tiny.prompt(5), None, SamplingParams(max_tokens=9, ignore_eos=True))
    for name in ("bad", "good"):
        engine.add_request(name, request)
    answers = run(engine)
    assert answers["bad"].error is not None
    assert answers["bad"].error.code is ErrorCode.NUMERICAL
    assert len(answers["bad"].token_ids) == 2
    assert_same(answers["good"], plain.generate([request])[0])


def test_generate_works_again_and_again(late: LateEngine, plain: Engine) -> None:
    engine = late(max_num_seqs=3, max_model_len=128)
    rng = random.Random(9)
    requests = [random_request(rng, None, has_penalties=True) for _ in range(7)]
    for _ in range(2):
        for got, wanted in zip(engine.generate(requests), plain.generate(requests), strict=True):
            assert (got.token_ids, got.finish_reason) == (wanted.token_ids, wanted.finish_reason)
