"""Steps as CUDA runs them, one ahead of the host, padded and from fixed places: against the CPU's, token by token."""

from __future__ import annotations

import random
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from cuda_stand_ins import TrunkGraphs, cuda_forward
from test_judge import PAGE_BYTES_F32
from test_scores import random_request

from medley_worker import Completion, Engine, Request, SamplingParams
from medley_worker.engine import assembly, step_inputs
from medley_worker.engine.sequences import Refused
from medley_worker.models import Decoder, load_model
from medley_worker.ops.paged import check_supported, window_left, workspace_bytes
from medley_worker.ops.rope import apply_rope, cos_sin_cache, rope_angles, rope_frequencies

MAX_TOKENS = 24  # prompts are cut into chunks beside decode rows


def mixed_requests(names: list[str]) -> list[Request]:
    """Plain, random, penalised and masked draws, of all adapters and of none."""
    rng = random.Random(3)
    requests: list[Request] = []
    for seed in range(20):
        kind = seed % 4
        sampling = SamplingParams(
            max_tokens=rng.randint(1, 65),
            temperature=0.8 if kind == 1 else 0.0,
            top_p=0.9 if kind == 1 else 1.0,
            seed=seed,
            repetition_penalty=1.3 if kind == 2 else 1.0,
            min_tokens=1 if kind == 3 else 0,
        )
        prompt = list(tiny.prompt(rng.randint(1, 28), seed=seed))
        requests.append(Request(prompt, rng.choice([None, *names]), sampling))
    return requests


def run(
    model_dir: Path, adapters: dict[str, Path], requests: list[Request], num_pages: int = 8
) -> tuple[list[Completion], int]:
    shape = tiny.MODELS["mistral"]()
    page_bytes = PAGE_BYTES_F32 * shape.num_hidden_layers * shape.num_key_value_heads
    page_bytes *= shape.hidden_size // shape.num_attention_heads
    engine = Engine.load(
        model_dir,
        max_num_seqs=7,
        max_model_len=96,
        max_num_batched_tokens=MAX_TOKENS,
        kv_cache_bytes=num_pages * page_bytes,
        adapter_slots=1,
    )
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    completions = engine.generate(requests)
    engine.check_integrity()
    preemptions = engine.stats().preemptions
    engine.close()
    assert not any(isinstance(completion, Refused) for completion in completions)
    return completions, preemptions


@pytest.mark.parametrize(("kind", "is_invariant"), [("mistral", False), ("qwen3", False), ("mistral", True)])
def test_a_step_ahead_the_tokens_are_those_of_one_step_at_a_time(
    kind: str, is_invariant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = tiny.make_model(kind, tmp_path / "model")
    adapters = tiny.make_adapters(model_dir, tmp_path)
    requests = mixed_requests(list(adapters))
    expected, _ = run(model_dir, adapters, requests)
    monkeypatch.setattr(step_inputs, "TOKEN_BUCKETS", (8, 16))  # longer steps run operator by operator
    replay = mock.create_autospec(TrunkGraphs.replay, side_effect=TrunkGraphs.replay)
    trunk = mock.create_autospec(Decoder.trunk, side_effect=Decoder.trunk)
    with cuda_forward(monkeypatch, MAX_TOKENS, is_invariant) as build:
        monkeypatch.setattr(assembly, "ModelForward", build)
        monkeypatch.setattr(TrunkGraphs, "replay", replay)
        monkeypatch.setattr(Decoder, "trunk", trunk)
        found, preemptions = run(model_dir, adapters, requests)
    lengths = [len(call.args[1].token_ids) for call in trunk.call_args_list]
    if is_invariant:
        assert not replay.called, "all its passes are of decode rows"
    else:
        assert any(call.args[2] for call in replay.call_args_list), "none with LoRA"
        assert max(len(call.args[1]) for call in replay.call_args_list) <= 16 < max(lengths)
    assert preemptions > 0 or kind != "mistral", "pages were to run out"
    for one, two in zip(expected, found, strict=True):
        assert two.token_ids == one.token_ids
        assert two.finish_reason == one.finish_reason
        assert two.logprobs == pytest.approx(one.logprobs, abs=1e-4)


@pytest.mark.parametrize("is_invariant", [False, True])
def test_scores_and_alternatives_are_those_of_one_step_at_a_time(
    is_invariant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = tiny.make_model("mistral", tmp_path / "model")
    specs = {name: tiny.MIXED_ADAPTERS[name] for name in ("rank8", "patterns")}
    adapters = tiny.make_adapters(model_dir, tmp_path, specs)
    rng = random.Random(5)
    requests = [random_request(rng, name) for name in [None, *adapters] * 5]
    expected, _ = run(model_dir, adapters, requests)
    with cuda_forward(monkeypatch, MAX_TOKENS, is_invariant) as build:
        monkeypatch.setattr(assembly, "ModelForward", build)
        found, preemptions = run(model_dir, adapters, requests, num_pages=4)
    assert preemptions > 0
    for one, two in zip(expected, found, strict=True):
        assert (two.token_ids, two.finish_reason, two.error) == (one.token_ids, one.finish_reason, None)
        assert two.logprobs == pytest.approx(one.logprobs, abs=1e-4)
        if one.details is None or two.details is None:
            assert one.details is two.details
            continue
        for field in ("prompt_token_ids", "is_greedy"):
            assert getattr(two.details, field) == getattr(one.details, field)
        for field in ("top_token_ids", "prompt_top_token_ids"):
            pairs = list(zip(getattr(two.details, field), getattr(one.details, field), strict=True))
            # Two tokens may change places where they are about as likely.
            assert sum(a != b for a, b in pairs) <= 0.01 * len(pairs)
        for field in ("top_logprobs", "prompt_logprobs", "prompt_top_logprobs"):
            assert getattr(two.details, field) == pytest.approx(getattr(one.details, field), abs=1e-4)


def test_the_cache_of_cosines_turns_as_the_angles_of_a_step_do(tmp_path: Path) -> None:
    config = load_model(tiny.make_model("llama3", tmp_path)).config
    assert config.rope_scaling is not None
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    positions = torch.tensor([0, 3, 17, config.max_model_len - 1])
    x = torch.randn((4, 2, config.head_dim), generator=torch.Generator().manual_seed(0))
    cos, sin = torch.split(cos_sin_cache(frequencies, config.max_model_len)[positions], config.head_dim // 2, -1)
    turned = apply_rope(x, torch.cat((cos, cos), -1).unsqueeze(1), sin.unsqueeze(1))
    assert torch.equal(turned, apply_rope(x, *rope_angles(positions, frequencies, torch.float32)))


def test_what_cuda_has_no_attention_for_is_refused_by_name(tmp_path: Path) -> None:
    config = load_model(tiny.make_model("llama2", tmp_path)).config
    with pytest.raises(ValueError, match=rf"head_dim: got {config.head_dim}, wanted one of 64, 128, 256 on cuda"):
        check_supported(config, torch.bfloat16)


def test_windows_count_the_query_itself_and_workspaces_have_room_for_a_split_of_every_head(tmp_path: Path) -> None:
    assert (window_left(None), window_left(1), window_left(4096)) == (-1, 0, 4095)
    config = load_model(tiny.make_model("llama2", tmp_path)).config
    assert workspace_bytes(config, max_rows=8, num_sms=132) >= 128 << 20
    assert workspace_bytes(config, max_rows=100_000, num_sms=132) > workspace_bytes(config, 50_000, 132)
