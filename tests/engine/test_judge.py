"""The judge is transformers + PEFT, one adapter at a time, float32; ours is one mixed batch through Engine.

Our tokens are fed to the judge, whose logits at each position say which token it would have taken there. A token
of ours that is not its best passes only where its own two best lie within TIE of each other.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tiny
import torch

from medley_worker import Completion, Engine, Request, SamplingParams

TIE = 1e-4
ATOL = 1e-4
NUM_NEW = 40
PAGE_BYTES_F32 = 2 * 32 * 4  # keys and values, tokens, bytes: times layers, heads and head size


def assert_judged(drawn_from: torch.Tensor, completion: Completion) -> None:
    """drawn_from: [n, V] the judge's logits at the places where our n tokens were drawn."""
    tokens = torch.tensor(completion.token_ids)[:, None]
    best = drawn_from.topk(2).values
    chosen = drawn_from.gather(1, tokens)[:, 0]
    is_best = chosen == best[:, 0]
    is_tie = (best[:, 0] - best[:, 1] <= TIE) & (chosen == best[:, 1])
    assert bool((is_best | is_tie).all()), f"not the judge's tokens at {(~(is_best | is_tie)).nonzero().tolist()}"
    expected = torch.log_softmax(drawn_from, -1).gather(1, tokens)[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=ATOL)


def mixed_requests(adapters: dict[str, Path]) -> list[Request]:
    rng = random.Random(7)
    requests = [
        Request(tiny.prompt(rng.choice([1, 2, 17, 31, 40, 50]), rng.randrange(10**6)), name, sampling)
        for sampling in [SamplingParams(max_tokens=NUM_NEW, ignore_eos=True)]
        for name in (None, *adapters)
        for _ in range(3)
    ]
    rng.shuffle(requests)
    return requests


CASES: list[tuple[str, dict[str, object]]] = [(kind, {}) for kind in tiny.MODELS] + [
    ("llama2", {"tie_word_embeddings": True})
]


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=[f"{k}{'-tied' if c else ''}" for k, c in CASES])
def test_a_mixed_batch_says_what_the_judge_says_of_each_adapter_alone(
    kind: str, changes: dict[str, object], tmp_path: Path
) -> None:
    model_dir = tiny.make_model(kind, tmp_path / "model", **changes)
    adapters = tiny.make_adapters(model_dir, tmp_path)
    requests = mixed_requests(adapters)
    shape = tiny.MODELS[kind]()
    head_dim = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    page_bytes = PAGE_BYTES_F32 * shape.num_hidden_layers * shape.num_key_value_heads * head_dim
    engine = Engine.load(
        model_dir,
        max_num_seqs=8,
        max_model_len=96,
        max_num_batched_tokens=24,  # prompts are cut into chunks
        kv_cache_bytes=9 * page_bytes,  # less than eight rows come to want: preemption
        adapter_slots=1,  # one adapter of rank 128 or a few smaller ones: eviction
    )
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    completions = engine.generate(requests)
    engine.check_integrity()
    stats = engine.stats()
    engine.close()
    assert stats.preemptions > 0
    assert stats.adapter_evictions > 0
    assert stats.adapters / stats.steps > 1.3, "the batch was not mixed"

    judge = tiny.Judge(model_dir, adapters)
    for request, completion in zip(requests, completions, strict=True):
        assert len(completion.token_ids) == NUM_NEW
        prompt = list(request.prompt_token_ids)
        assert request.adapter is None or isinstance(request.adapter, str)
        logits = judge.logits([*prompt, *completion.token_ids], request.adapter)
        assert_judged(logits[len(prompt) - 1 : -1], completion)
