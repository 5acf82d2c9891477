"""The engine on tiny models: the same answers in any company, and every sampling field at work."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models

from medley.spec.adapters import AdapterRefused
from medley.spec.errors import ErrorCode
from medley.spec.jobs import Checkpoint, FinishReason
from medley.spec.wire import AdapterRef, EngineConfig
from medley_worker import Completion, Engine, Refused, Request, RequestOutput, SamplingParams
from medley_worker.compare import compare, read_jobs
from medley_worker.engine import residency

NUM_REQUESTS = 18
PAGE_BYTES = 2 * 32 * 4 * 2 * 2 * 16  # of tiny's llama3: k and v, tokens, float32, layers, heads, head size


@pytest.fixture(scope="module")
def engine(tiny_model: Path, tiny_adapters: dict[str, Path]) -> Iterator[Engine]:
    """Room for everything."""
    made = Engine.load(tiny_model, max_num_seqs=16, max_model_len=128, adapter_slots=8)
    for name, folder in tiny_adapters.items():
        made.add_adapter(name, folder)
    yield made
    made.close()


def one(engine: Engine, **sampling: object) -> Completion:
    fields = {"max_tokens": 16, "ignore_eos": True} | sampling
    return engine.generate([Request(tiny.prompt(9), None, msgspec.convert(fields, SamplingParams))])[0]


def random_request(rng: random.Random, adapter: str | None) -> Request:
    sampling = SamplingParams(
        max_tokens=rng.choice([1, 30, 80, 80]),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.5]),
        top_k=rng.choice([None, 20]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.02]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        presence_penalty=rng.choice([0.0, 0.5]),
        logit_bias=rng.choice([{}, {17: 3.0}]),
        seed=rng.randrange(2**63),
        min_tokens=rng.choice([0, 1]),
        ignore_eos=rng.random() < 0.8,
    )
    return Request(
        tiny.prompt(rng.choice([1, 8, 20, 45]), rng.randrange(1000)),
        adapter,
        sampling,
    )


@pytest.mark.parametrize("seed", range(2))
def test_company_changes_no_answer(seed: int, engine: Engine, tiny_model: Path, tiny_adapters: dict[str, Path]) -> None:
    """Random arrivals, aborts, releases with resumption, evictions, preemptions: each answer as if alone."""
    rng = random.Random(seed)
    names = [None, *tiny_adapters]
    requests = {i: random_request(rng, names[i % len(names)]) for i in range(NUM_REQUESTS)}
    crowded = Engine.load(
        tiny_model,
        max_num_seqs=6,
        max_model_len=128,
        max_num_batched_tokens=rng.choice([7, 40]),
        kv_cache_bytes=6 * PAGE_BYTES,
        adapter_slots=1,
    )
    for name, folder in tiny_adapters.items():
        crowded.add_adapter(name, folder)
    answers: dict[object, RequestOutput] = {}
    arriving, aborted = list(requests), set[int]()
    while arriving or crowded.has_work:
        action = rng.random()
        if arriving and action > 0.6:
            index = arriving.pop()
            is_streamed = rng.random() < 0.5
            crowded.add_request(index, requests[index], priority=rng.choice([0, 0, 1]), stream=is_streamed)
        elif action < 0.01:
            index = rng.randrange(len(requests))
            if index not in arriving and index not in answers:
                crowded.abort([index])
                aborted.add(index)
        elif action < 0.04:
            released = crowded.release(None if rng.random() < 0.1 else [rng.randrange(NUM_REQUESTS)])
            for key, checkpoint in released.items():
                assert isinstance(key, int)
                crowded.add_request(key, requests[key], checkpoint)
        else:
            answers |= {o.request_id: o for o in crowded.step() if o.is_finished}
        crowded.check_integrity()
    stats = crowded.stats()
    assert stats.preemptions > 0
    assert stats.adapter_evictions > 0
    assert stats.pages_used == stats.num_running == stats.num_waiting == 0
    assert set(answers) == set(requests) - aborted
    for request_id, answer in answers.items():
        assert isinstance(request_id, int)
        (alone,) = engine.generate([requests[request_id]])
        assert list(answer.token_ids) == alone.token_ids
        assert answer.finish_reason == alone.finish_reason
        torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(alone.logprobs), rtol=0, atol=1e-5)
    crowded.close()


def test_new_tokens_of_all_steps_are_the_whole_answer(engine: Engine) -> None:
    engine.add_request("a", Request(tiny.prompt(5), "rank8", SamplingParams(max_tokens=7, ignore_eos=True)))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.new_token_ids
            last = output
    assert last.is_finished
    assert tuple(tokens) == last.token_ids
    assert len(last.logprobs) == 7


def test_a_checkpoint_that_is_already_complete_ends_at_once(engine: Engine) -> None:
    done = Checkpoint(token_ids=(5, 6), logprobs=(-1.0, -2.0))
    ends = Checkpoint(token_ids=(2,), logprobs=(-1.0,))
    engine.add_request("length", Request([3], None, SamplingParams(max_tokens=2)), done)
    engine.add_request("stop", Request([3], None, SamplingParams(max_tokens=2)), ends)
    reasons = {o.request_id: (o.finish_reason, o.token_ids) for o in engine.step()}
    assert reasons == {"length": (FinishReason.LENGTH, (5, 6)), "stop": (FinishReason.STOP, (2,))}
    assert not engine.has_work


def test_same_seed_same_tokens_and_other_seed_others(engine: Engine) -> None:
    first = one(engine, temperature=1.0, seed=5).token_ids
    assert one(engine, temperature=1.0, seed=5).token_ids == first
    assert one(engine, temperature=1.0, seed=6).token_ids != first
    assert one(engine, temperature=1.0).token_ids != one(engine, temperature=1.0).token_ids


def test_filters_that_keep_one_token_are_greedy(engine: Engine) -> None:
    greedy = one(engine).token_ids
    for field, value in (("top_k", 1), ("top_p", 1e-6), ("min_p", 1.0)):
        assert one(engine, temperature=1.5, seed=1, **{field: value}).token_ids == greedy, field


def test_a_banned_token_is_never_drawn_and_a_wanted_one_always(engine: Engine) -> None:
    first = one(engine).token_ids[0]
    assert first not in one(engine, logit_bias={first: -100.0}).token_ids
    assert set(one(engine, logit_bias={50: 100.0}).token_ids) == {50}


def test_penalties_end_repetition(engine: Engine) -> None:
    wanted = {50: 30.0}
    assert len(set(one(engine, logit_bias=wanted).token_ids)) == 1
    for field, value in (("repetition_penalty", 50.0), ("presence_penalty", 2.0), ("frequency_penalty", 2.0)):
        bias = {50: 30.0} if field == "repetition_penalty" else {50: 6.0}
        plain = one(engine, logit_bias=bias).token_ids.count(50)
        assert one(engine, logit_bias=bias, **{field: value}).token_ids.count(50) < plain, field


def test_end_tokens_end_a_text_unless_told_otherwise(engine: Engine) -> None:
    (eos,) = (2,)  # tiny's own
    bias = {eos: 100.0}
    ended = one(engine, logit_bias=bias, ignore_eos=False)
    assert (ended.token_ids, ended.finish_reason) == ([eos], FinishReason.STOP)
    ignored = one(engine, logit_bias=bias)
    assert (ignored.token_ids, ignored.finish_reason) == ([eos] * 16, FinishReason.LENGTH)
    later = one(engine, logit_bias=bias, ignore_eos=False, min_tokens=3)
    assert later.token_ids[3:] == [eos]
    assert eos not in later.token_ids[:3]
    by_id = one(engine, logit_bias={50: 100.0}, stop_token_ids=[50])
    assert (by_id.token_ids, by_id.finish_reason) == ([50], FinishReason.STOP)


def test_a_text_ends_at_the_models_length(engine: Engine) -> None:
    request = Request(tiny.prompt(120), None, SamplingParams(max_tokens=100, ignore_eos=True))
    (completion,) = engine.generate([request])
    assert len(completion.token_ids) == 8
    assert completion.finish_reason is FinishReason.LENGTH


def test_a_stop_string_cuts_tokens_logprobs_and_text(tmp_path: Path, tiny_model: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).symlink_to(file)
    words = {f"<{i}>": i for i in range(tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    engine = Engine.load(folder, max_num_seqs=4, max_model_len=64)
    whole = one(engine)
    stop = "><".join(str(t) for t in whole.token_ids[6:8])
    other = Request(tiny.prompt(9), None, SamplingParams(max_tokens=16, ignore_eos=True))
    request = replace(other, sampling=msgspec.structs.replace(other.sampling, stop=(stop,)))
    cut, uncut = engine.generate([request, other])
    assert uncut.token_ids == whole.token_ids
    assert cut.finish_reason is FinishReason.STOP
    kept = len(cut.token_ids)
    assert cut.token_ids == whole.token_ids[:kept]
    assert len(cut.logprobs) == kept <= 8
    text = "".join(f"<{t}>" for t in whole.token_ids)
    assert cut.text == text[: text.index(stop)]
    engine.close()


def test_bad_requests_are_refused_by_name_and_leave_nothing_behind(engine: Engine) -> None:
    cases = [
        (Request([]), ErrorCode.INVALID_TOKEN),
        (Request([tiny.VOCAB]), ErrorCode.INVALID_TOKEN),
        (Request([5] * 128), ErrorCode.PROMPT_TOO_LONG),
        (Request([5], "nobody"), ErrorCode.ADAPTER_UNAVAILABLE),
        (Request([5], None, SamplingParams(logit_bias={10**6: 1.0})), ErrorCode.INVALID_TOKEN),
        (Request([5], None, SamplingParams(top_p=2.0)), ErrorCode.ENGINE),
    ]
    for request, code in cases:
        with pytest.raises(Refused) as caught:
            engine.add_request("bad", request)
        assert caught.value.error.code is code
        with pytest.raises(ValueError, match=r"requests\[1\]"):
            engine.generate([Request([5]), request])
    assert not engine.has_work
    engine.check_integrity()


def test_an_id_in_flight_is_refused_and_generate_wants_the_engine_for_itself(engine: Engine) -> None:
    engine.add_request("a", Request([5]))
    with pytest.raises(ValueError, match="in flight"):
        engine.add_request("a", Request([5]))
    with pytest.raises(RuntimeError, match="in flight"):
        engine.generate([Request([5])])
    engine.abort(["a", "unknown"])
    assert not engine.has_work


def test_nan_logits_fail_their_row_alone(tmp_path: Path, tiny_model: Path, tiny_adapters: dict[str, Path]) -> None:
    engine = Engine.load(tiny_model, max_num_seqs=4, max_model_len=64)
    tensors = load_file(tiny_adapters["rank8"] / "adapter_model.safetensors")
    tensors = {name: tensor * 1e30 for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = (tiny_adapters["rank8"] / "adapter_config.json").read_bytes()
    (tmp_path / "adapter_config.json").write_bytes(config)
    engine.add_adapter("huge", tmp_path)
    alone = one(engine)
    good, bad = engine.generate(
        [
            Request(tiny.prompt(9), None, SamplingParams(max_tokens=16, ignore_eos=True)),
            Request(tiny.prompt(9), "huge", SamplingParams(max_tokens=16, ignore_eos=True)),
        ]
    )
    assert good == alone
    assert bad.error is not None
    assert bad.error.code is ErrorCode.NUMERICAL
    assert one(engine) == alone, "the pages of the bad row carried its NaN on"
    engine.close()


def test_an_adapter_can_be_removed_and_its_name_used_again(engine: Engine, tiny_adapters: dict[str, Path]) -> None:
    request = Request(tiny.prompt(5), "again", SamplingParams(max_tokens=8, ignore_eos=True))
    engine.add_adapter("again", tiny_adapters["rank8"])
    (first,) = engine.generate([request])
    engine.add_request("x", request)
    with pytest.raises(ValueError, match="in use"):
        engine.remove_adapter("again")
    engine.abort(["x"])
    engine.remove_adapter("again")
    with pytest.raises(KeyError):
        engine.remove_adapter("again")
    engine.add_adapter("again", tiny_adapters["rank128"])
    (second,) = engine.generate([request])
    assert first.token_ids != second.token_ids
    engine.remove_adapter("again")


def test_adapters_that_are_no_more_leave_memory_once_no_request_needs_them(
    engine: Engine, tiny_adapters: dict[str, Path]
) -> None:
    tenant = UUID(int=1)
    refs = [AdapterRef(tenant, UUID(int=100 + i), str(path)) for i, path in enumerate(list(tiny_adapters.values())[:2])]
    for i, ref in enumerate(refs):
        engine.add_request(f"of {i}", Request((1, 2, 3), ref, SamplingParams(max_tokens=4 + 40 * i)))
    while engine.stats().num_running + engine.stats().num_waiting == 2:
        engine.step()
    engine.forget(refs)
    assert set(engine.stats().resident) & {ref.revision for ref in refs} == {refs[1].revision}
    while engine.has_work:
        engine.step()
    engine.forget([*refs, AdapterRef(tenant, UUID(int=999), "/nowhere")])
    assert not set(engine.stats().resident) & {ref.revision for ref in refs}
    engine.check_integrity()


def test_sizes_that_cannot_work_are_refused_by_name(tiny_model: Path) -> None:
    wrong: dict[str, object] = {
        "kv_cache_bytes": 10,
        "max_num_seqs": 0,
        "max_model_len": 10**6,
        "max_num_batched_tokens": 0,
        "adapter_slots": -1,
        "adapter_host_bytes": -1,
        "max_tpot_ms": 0,
        "dtype": "int8",
        "device": "abacus",
    }
    for field, value in wrong.items():
        fields = {"model_dir": str(tiny_model), "max_num_seqs": 4} | {field: value}
        with pytest.raises(ValueError, match=field):
            Engine(msgspec.convert(fields, EngineConfig))


def test_random_weights_need_no_weight_files(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    engine = Engine.load(tmp_path, load_format="random", max_model_len=64)
    assert len(one(engine).token_ids) == 16
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.stats()


def test_mixing_is_compared_with_running_adapter_after_adapter(
    tiny_model: Path, tiny_adapters: dict[str, Path]
) -> None:
    lines = [
        msgspec.json.encode(
            {"prompt_token_ids": tiny.prompt(6, i), "adapter_dir": str(folder), "max_tokens": 4, "ignore_eos": True}
        ).decode()
        for i, folder in enumerate([*tiny_adapters.values()] * 2)
    ]
    result = compare(tiny_model, list(read_jobs(lines, tiny_model)), max_num_seqs=16, rounds=1)
    assert result.tokens == len(lines) * 4
    assert result.rows_per_step_mixed == 16
    assert result.rows_per_step_sequential == 2
    assert result.speedup == result.sequential_s / result.mixed_s
    with pytest.raises(ValueError, match="line 1"):
        list(read_jobs(['{"prompt_token_ids": [1], "temprature": 1}'], tiny_model))
    with pytest.raises(ValueError, match="line 2"):
        list(read_jobs(['{"prompt_token_ids": [1]}', "{"], tiny_model))


def test_an_interrupted_generate_leaves_the_engine_free(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> list[RequestOutput]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([Request([5]), Request([6])])
    assert not engine.has_work
    engine.check_integrity()
    assert len(one(engine).token_ids) == 16


def test_lists_and_arrays_do_for_token_ids(engine: Engine) -> None:
    stops: Any = [50, 51]
    sampling = SamplingParams(max_tokens=4, stop_token_ids=stops, logit_bias={50: 100.0})
    prompt: Any = np.array([5, 6])
    for given in (prompt, [5, 6]):
        assert engine.generate([Request(given, None, sampling)])[0].token_ids == [50]
    with pytest.raises(TypeError, match="stop: got 'END', wanted a list"):
        SamplingParams(stop="END")  # type: ignore[arg-type]


def test_nothing_is_reported_for_an_aborted_request_that_was_complete_when_it_came(engine: Engine) -> None:
    done = Checkpoint(token_ids=(5, 6), logprobs=(-1.0, -2.0))
    engine.add_request("done", Request([3], None, SamplingParams(max_tokens=2)), done)
    engine.abort(["done"])
    assert not engine.has_work


def test_adding_an_adapter_refuses_nan_with_all_reasons_and_a_name_in_use(
    engine: Engine, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="'rank8' is known already"):
        engine.add_adapter("rank8", tiny_adapters["rank1"])
    tensors = load_file(tiny_adapters["rank8"] / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = msgspec.json.decode((tiny_adapters["rank8"] / "adapter_config.json").read_bytes())
    (tmp_path / "adapter_config.json").write_bytes(msgspec.json.encode(config | {"use_dora": True}))
    with pytest.raises(AdapterRefused, match=r"use_dora.*NaN or infinity"):
        engine.add_adapter("broken", tmp_path)
    with pytest.raises(AdapterRefused, match="no such file"):
        engine.add_adapter("broken", tmp_path / "missing")
    with pytest.raises(KeyError, match="broken"):
        engine.remove_adapter("broken")


def test_headers_of_adapters_long_gone_do_not_pile_up(
    tiny_model: Path, tiny_adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "MIN_KNOWN", 4)
    engine = Engine.load(tiny_model, max_num_seqs=4, max_model_len=64, adapter_slots=1)
    engine.add_adapter("named", tiny_adapters["rank1"])
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)
    for _ in range(12):
        refs = [AdapterRef(uuid4(), uuid4(), str(tiny_adapters["rank128"])) for _ in range(3)]
        completions = engine.generate([Request([5], ref, sampling) for ref in refs])
        assert all(completion.error is None for completion in completions)
        engine.check_integrity()
    assert engine._parts.residency.num_known <= 8
    assert engine.generate([Request([5], "named", sampling)])[0].error is None
    engine.close()
