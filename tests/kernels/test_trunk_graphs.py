"""Captured steps with prompt chunks beside the same operators one by one, padded tokens and many adapters included."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import cuda_models
import pytest
import torch
from cuda_models import Tiny, assert_same_but_for_ties, load_engine, prompt
from torch import Tensor

from medley_worker import Engine, Request, SamplingParams
from medley_worker.engine.adapter_memory import AdapterKey
from medley_worker.engine.step_inputs import TOKEN_BUCKETS, bucket_for
from medley_worker.models import Decoder
from medley_worker.models.decoder import Attend, run_pieces

if TYPE_CHECKING:
    from medley_worker.engine.cuda_forward import CudaForward

pytestmark = pytest.mark.gpu

MAX_LEN = 256


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return cuda_models.make("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def engine(made: Tiny) -> Engine:
    return load_engine(made, max_num_seqs=32, max_model_len=MAX_LEN, adapter_slots=8)


def forward_of(engine: Engine) -> CudaForward:
    from medley_worker.engine.cuda_forward import CudaForward  # where there is CUDA

    forward = engine._parts.forward
    assert isinstance(forward, CudaForward)
    return forward


def jobs(made: Tiny, num_jobs: int, seed: int) -> list[Request]:
    """Of all adapters and of the base, of lengths that have prompts come in nearly every step."""
    rng = random.Random(seed)
    return [
        Request(
            prompt(rng.randint(1, 90), rng.randrange(10**6)),
            rng.choice(made.names),
            SamplingParams(max_tokens=rng.randint(1, 12), ignore_eos=True),
        )
        for _ in range(num_jobs)
    ]


def copy_q(_: int, qkv: Tensor, out: Tensor | None = None) -> Tensor:
    """In the place of attention: each token's q."""
    assert out is not None
    return out.copy_(qkv[:, : out.shape[1]])


@torch.inference_mode()
def one_by_one(decoder: Decoder, token_ids: Tensor, lora: object | None) -> tuple[Tensor, Tensor]:
    width = decoder.config.num_heads * decoder.config.head_dim

    def attend(layer: int, qkv: Tensor) -> Tensor:
        return copy_q(layer, qkv, qkv.new_empty((len(qkv), width)))

    return run_pieces(decoder.pieces(token_ids, lora), attend)


@pytest.mark.parametrize("has_lora", [False, True])
def test_a_replay_has_the_bits_of_its_operators_one_by_one(made: Tiny, engine: Engine, has_lora: bool) -> None:
    engine.generate(jobs(made, 32, seed=1))  # loads the adapters
    forward, rng = forward_of(engine), random.Random(2)
    decoder, keys = forward._decoder, list[AdapterKey | None](forward._adapters._memory.keys())
    assert len(keys) > 3
    for num_tokens in (1, 15, 16, 17, 100, 255, 257, 511, 512):
        with torch.inference_mode():
            lora = None
            if has_lora:
                counts = [1] * (num_tokens // 2) + [num_tokens - num_tokens // 2]
                lora = forward._adapters.lora_batch([rng.choice([None, *keys]) for _ in counts[:-1]] + keys[:1], counts)
            padded = torch.zeros(bucket_for(TOKEN_BUCKETS, num_tokens), dtype=torch.int64, device="cuda")
            padded[:num_tokens] = torch.randint(3, cuda_models.VOCAB, (num_tokens,))
            x, residual = forward._trunk_graphs.replay(padded[:num_tokens], has_lora, copy_q)
            found = x.clone(), residual.clone()
            wanted = one_by_one(decoder, padded, lora)
        for got, want in zip(found, wanted, strict=True):
            assert torch.isfinite(got).all()
            assert torch.equal(got, want[:num_tokens]), f"{num_tokens} tokens"


def test_jobs_say_the_same_where_no_step_with_prompts_is_captured(
    made: Tiny, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = jobs(made, 96, seed=3)
    graphs = forward_of(engine)._trunk_graphs
    runs, replay, replayed = dict(graphs._runs), graphs.replay, set()

    def counted(token_ids: Tensor, has_lora: bool, attend: Attend) -> tuple[Tensor, Tensor]:
        replayed.add(has_lora)
        return replay(token_ids, has_lora, attend)

    monkeypatch.setattr(graphs, "replay", counted)
    captured = engine.generate(wanted)
    assert replayed, "no step with prompts was replayed"
    assert graphs._runs == runs, "a step of other adapters captured something"
    monkeypatch.setattr(graphs, "has", lambda *_: False)
    assert_same_but_for_ties(captured, engine.generate(wanted))
    engine.check_integrity()


def test_steps_longer_than_any_bucket_run_beside_captured_ones(made: Tiny) -> None:
    """A step's tokens and its decode rows, padded, may be more than the last bucket, or fewer than the first."""
    sizes = {"max_num_seqs": 48, "max_model_len": MAX_LEN, "adapter_slots": 8}
    long, short = (load_engine(made, max_num_batched_tokens=n, **sizes) for n in (1024, 48))
    wanted = jobs(made, 120, seed=4)
    assert_same_but_for_ties(long.generate(wanted), short.generate(wanted))
    for engine in (long, short):
        engine.check_integrity()
        engine.close()
