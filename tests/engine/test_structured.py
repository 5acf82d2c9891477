"""Structured output: whatever a model is drawn to, its text is what was asked for; what cannot be asked fails alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from cuda_stand_ins import cuda_forward
from test_pipeline import LateForward
from timing import keeps_to, timed
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from medley.spec.errors import ErrorCode
from medley.spec.jobs import FinishReason
from medley_worker import Completion, Engine, Request, RequestOutput, SamplingParams
from medley_worker.engine import assembly
from medley_worker.engine.rows import RowTable

EOS = 2
PAGE_BYTES = 2 * 32 * 4 * 2 * 2 * 16  # of tiny's llama3: k and v, tokens, float32, layers, heads, head size
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}, "is": {"type": "boolean"}},
    "required": ["name", "age", "is"],
    "additionalProperties": False,
}
CHOICES = ("yes", "no", 'per"haps', "a|b\\n", "yesterday")


def byte_chars() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    chars = {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [chars[byte] for byte in range(256)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with a tokenizer: three special tokens, then the bytes of ASCII."""
    folder = tmp_path_factory.mktemp("structured") / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).symlink_to(file)
    specials = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*specials, *byte_chars()[:128]])}
    assert len(vocab) == tiny.VOCAB
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def engine(model_dir: Path, tiny_adapters: dict[str, Path]) -> Iterator[Engine]:
    made = Engine.load(model_dir, max_num_seqs=16, max_model_len=256, adapter_slots=8)
    for name, folder in tiny_adapters.items():
        made.add_adapter(name, folder)
    yield made
    made.close()


def spoken(completion: Completion | RequestOutput) -> str:
    """The text of a completion that has ended by itself."""
    assert completion.error is None, completion.error
    assert completion.finish_reason is FinishReason.STOP
    *tokens, last = completion.token_ids
    assert last == EOS
    return bytes(token - 3 for token in tokens).decode()


def is_person(text: str) -> bool:
    value = json.loads(text)
    assert list(value) == ["name", "age", "is"]
    return (
        isinstance(value["name"], str)
        and len(value["name"]) <= 6
        and type(value["age"]) is int
        and type(value["is"]) is bool
    )


# Fields that ask for a text, and whether a text is one. Short ones, as the model draws without sense.
ASKED: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
    ({"regex": r"\d{3}-[a-f]{2}"}, lambda text: re.fullmatch(r"\d{3}-[a-f]{2}", text) is not None),
    ({"regex": "(foo|ba[rz]){1,3}!"}, lambda text: re.fullmatch("(foo|ba[rz]){1,3}!", text) is not None),
    ({"choice": CHOICES}, lambda text: text in CHOICES),
    ({"json_schema": {"enum": ["red", 7, None]}}, lambda text: json.loads(text) in ("red", 7, None)),
    (
        {"json_schema": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}},
        lambda text: 2 <= len(json.loads(text)) <= 3 and all(type(v) is bool for v in json.loads(text)),
    ),
]


def ask(fields: dict[str, Any], seed: int, adapter: str | None = None, **others: Any) -> Request:
    # Blanks may be drawn without end between the parts of a JSON text.
    bias = {3 + byte: -100.0 for byte in b" \t\r\n"}
    options = {"max_tokens": 150, "temperature": 1.0, "seed": seed, "logit_bias": bias} | fields | others
    return Request(tiny.prompt(5, seed), adapter, SamplingParams(**options))


def test_every_draw_is_what_was_asked_for(engine: Engine, tiny_adapters: dict[str, Path]) -> None:
    names = [None, *tiny_adapters]
    wanted = [(fields, holds, seed) for seed in range(12) for fields, holds in ASKED]
    plain = [Request(tiny.prompt(5, i), None, SamplingParams(max_tokens=20, ignore_eos=True)) for i in range(4)]
    guided = [ask(fields, seed, names[seed % len(names)]) for fields, _, seed in wanted]
    *completions, a, b, c, d = engine.generate([*guided, *plain])
    for (fields, holds, seed), completion in zip(wanted, completions, strict=True):
        assert holds(spoken(completion)), f"{fields} {seed}: {spoken(completion)!r}"
    assert len({spoken(completion) for completion in completions}) > 20, "nothing was left to be drawn"
    assert [a, b, c, d] == engine.generate(plain)


def test_an_object_has_its_properties_in_order_and_of_their_types(engine: Engine) -> None:
    digits = {3 + byte: -3.0 for byte in b"0123456789"}  # an integer ends some time
    requests = [ask({"json_schema": PERSON}, seed, max_tokens=200) for seed in range(16)]
    for request in requests:
        request.sampling.logit_bias.update(digits)
    ended = [c for c in engine.generate(requests) if c.finish_reason is FinishReason.STOP]
    assert len(ended) >= 8
    assert all(is_person(spoken(completion)) for completion in ended)


def test_greedy_draws_penalties_and_filters_keep_to_the_grammar(engine: Engine) -> None:
    others: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 2.0},
        {"top_k": 1},
        {"top_p": 0.1, "min_p": 0.5},
        {"presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"temperature": 0.0, "top_logprobs": 3},
    ]
    for fields, holds in ASKED:
        for completion in engine.generate([ask(fields, i, **other) for i, other in enumerate(others)]):
            assert holds(spoken(completion))


def test_a_text_that_is_cut_by_length_is_a_beginning_of_one(engine: Engine) -> None:
    (cut,) = engine.generate([ask({"regex": "[a-c]{20}"}, 1, max_tokens=7)])
    assert cut.finish_reason is FinishReason.LENGTH
    assert re.fullmatch("[a-c]{7}", bytes(token - 3 for token in cut.token_ids).decode())


def test_company_preemption_and_releases_change_no_guided_draw(engine: Engine, model_dir: Path) -> None:
    rng = random.Random(3)
    kinds = [fields for fields, _ in ASKED] + [{"regex": "[a-z]{90}"}] * 5  # long enough for pages to run out
    requests = {i: ask(kinds[i % len(kinds)], i) for i in range(24)}
    crowded = Engine.load(
        model_dir, max_num_seqs=6, max_model_len=128, max_num_batched_tokens=7, kv_cache_bytes=6 * PAGE_BYTES
    )
    assert_alone_and_together(crowded, engine, requests, rng)
    assert crowded.stats().preemptions > 0
    crowded.close()


def test_a_step_ahead_guided_rows_wait_for_their_tokens_and_the_others_do_not(
    engine: Engine, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = assembly.ModelForward

    def late(*parts: object) -> LateForward:
        rows = next(part for part in parts if isinstance(part, RowTable))
        return LateForward(real(*parts), rows, lambda _: None)  # type: ignore[arg-type]

    monkeypatch.setattr(assembly, "ModelForward", late)
    ahead = Engine.load(
        model_dir, max_num_seqs=6, max_model_len=128, max_num_batched_tokens=40, kv_cache_bytes=8 * PAGE_BYTES
    )
    long = Request(tiny.prompt(5), None, SamplingParams(max_tokens=60, ignore_eos=True))
    requests = {i: ask(ASKED[i % len(ASKED)][0], i) for i in range(12)} | {12: long, 13: long}
    assert_alone_and_together(ahead, engine, requests, random.Random(4))
    # Two plain rows alone take one step a token, whoever sits out beside them.
    before = ahead.stats().steps
    ahead.generate([long, ask({"regex": "[a-z]{20}"}, 0)])
    assert ahead.stats().steps - before <= 60 + 3
    ahead.close()


@pytest.mark.parametrize("is_invariant", [False, True])
def test_steps_as_cuda_runs_them_keep_to_the_grammar(
    is_invariant: bool, engine: Engine, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [ask(fields, seed) for seed in range(3) for fields, _ in ASKED]
    requests += [Request(tiny.prompt(5), None, SamplingParams(max_tokens=30, ignore_eos=True))] * 2
    wanted = engine.generate(requests)
    with cuda_forward(monkeypatch, 24, is_invariant) as build:
        monkeypatch.setattr(assembly, "ModelForward", build)
        ahead = Engine.load(
            model_dir, max_num_seqs=6, max_model_len=128, max_num_batched_tokens=24, kv_cache_bytes=16 * PAGE_BYTES
        )
        got = ahead.generate(requests)
        ahead.close()
    assert [c.token_ids for c in got] == [c.token_ids for c in wanted]


def assert_alone_and_together(other: Engine, engine: Engine, requests: dict[int, Request], rng: random.Random) -> None:
    """Random arrivals and releases with resumption on `other`: each answer as if alone on `engine`."""
    answers: dict[object, RequestOutput] = {}
    arriving = list(requests)
    while arriving or other.has_work:
        action = rng.random()
        if arriving and action > 0.6:
            index = arriving.pop()
            other.add_request(index, requests[index], stream=rng.random() < 0.5)
        elif action < 0.05:
            for key, checkpoint in other.release([rng.choice(list(requests))]).items():
                assert isinstance(key, int)
                other.add_request(key, requests[key], checkpoint)
        else:
            answers |= {o.request_id: o for o in other.step() if o.is_finished}
        other.check_integrity()
    assert set(answers) == set(requests)
    for index, alone in zip(requests, engine.generate(list(requests.values())), strict=True):
        assert list(answers[index].token_ids) == alone.token_ids
        assert answers[index].finish_reason == alone.finish_reason


HOSTILE: list[dict[str, Any]] = [
    {"regex": "(a"},
    {"regex": "(?=a)b"},
    {"json_schema": {"type": "nonsense"}},
    {"json_schema": {"type": "object", "properties": 5}},
    {"json_schema": {"$ref": "http://example.com/schema"}},
    {"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}},
    {"json_schema": {"type": "integer", "multipleOf": 99_999_989}},  # seconds and gigabytes, if it were let
    {"json_schema": {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(9)]} for i in range(9)]}},
    {"json_schema": {"$ref": "#"}},
]


def test_a_hostile_grammar_fails_alone_and_the_others_do_not_wait_for_it(model_dir: Path) -> None:
    keeps_to(2, lambda: _longest_step_s(model_dir), "a step that waits for a grammar")


def _longest_step_s(model_dir: Path) -> float:
    """Of an engine that meets each hostile grammar for the first time."""
    engine = Engine.load(model_dir, max_num_seqs=8, max_model_len=128)
    engine.generate([ask({"choice": ["a"]}, 0)])  # what compiles is running
    for i, fields in enumerate(HOSTILE):
        engine.add_request(("bad", i), ask(fields, i))
    plain = Request(tiny.prompt(5), None, SamplingParams(max_tokens=60, ignore_eos=True))
    for i in range(4):
        engine.add_request(("plain", i), plain)
    engine.add_request("good", ask({"regex": "[0-9]{5}"}, 1))
    ended: dict[object, RequestOutput] = {}
    longest_s = 0.0
    while engine.has_work:
        with timed() as step:
            outputs = engine.step()
        longest_s = max(longest_s, step.seconds)
        ended |= {output.request_id: output for output in outputs if output.is_finished}
        engine.check_integrity()
    for i, fields in enumerate(HOSTILE):
        error = ended["bad", i].error
        assert error is not None, fields
        assert error.code is ErrorCode.INVALID_GRAMMAR, fields
        assert len(error.message) < 400
    assert all(ended["plain", i].error is None for i in range(4))
    assert next(iter(ended)) in {("plain", i) for i in range(4)} | {("bad", i) for i in range(5)}
    assert re.fullmatch("[0-9]{5}", spoken(ended["good"]))

    def ask_again() -> float:
        with timed() as took:
            again = engine.generate([ask(fields, 9) for fields in HOSTILE])
        assert all(completion.error is not None for completion in again)
        return took.seconds

    keeps_to(2, ask_again, "a refusal that is remembered")
    engine.close()
    return longest_s


def test_a_killed_trial_process_is_started_again(model_dir: Path) -> None:
    engine = Engine.load(model_dir, max_num_seqs=4, max_model_len=64)
    before = set(psutil.Process().children())
    assert spoken(engine.generate([ask({"choice": ["ab"]}, 0)])[0]) == "ab"
    (child,) = set(psutil.Process().children()) - before
    child.kill()
    child.wait(10)
    assert spoken(engine.generate([ask({"choice": ["cd"]}, 0)])[0]) == "cd"
    (child,) = set(psutil.Process().children()) - before
    engine.close()
    child.wait(10)


def test_a_model_without_a_tokenizer_says_so(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, max_num_seqs=4, max_model_len=64)
    (completion,) = engine.generate([ask({"regex": "a"}, 0)])
    assert completion.error is not None
    assert completion.error.code is ErrorCode.ENGINE
    assert "tokenizer.json" in completion.error.message
    engine.close()


def test_what_waits_for_its_grammar_can_be_aborted_and_released(model_dir: Path) -> None:
    engine = Engine.load(model_dir, max_num_seqs=4, max_model_len=64)
    for name in "ab":
        engine.add_request(name, ask({"regex": f"{name}{{3}}"}, 0))
    engine.check_integrity()
    engine.abort(["a"])
    released = engine.release()
    assert list(released) == ["b"]
    assert released["b"].token_ids == ()
    assert not engine.has_work
    engine.check_integrity()
    engine.close()
