"""Tiny models and adapters of the shapes that CUDA kernels take, and transformers + PEFT on the device beside ours.

All weights are rounded to bfloat16 once, so that float32 and bfloat16 compute from the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from medley_worker import Completion, Engine, Request

# Tiny models and adapters are those of the engine's tests, in other sizes.
sys.path.append(str(Path(__file__).parents[1] / "engine"))

import tiny

VOCAB = 512
_SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 352}
# Every size of head and of group of query heads: 1, 2 and 4 to a KV head, 64 and 128 wide.
KINDS: dict[str, dict[str, Any]] = {
    "llama2": _SIZES | {"head_dim": 64},
    "llama3": _SIZES | {"head_dim": 64},
    "mistral": _SIZES | {"head_dim": 64, "num_attention_heads": 8},
    "qwen2": _SIZES,
    "qwen3": _SIZES | {"head_dim": 128, "num_attention_heads": 8},
}
# Two tokens whose log-probabilities are so close may change places: bfloat16 moves those of these models by up to 0.3.
NEAR_TIE = 0.4


@dataclass(frozen=True)
class Tiny:
    """A model's folder and its adapters' folders by name."""

    model_dir: Path
    adapters: dict[str, Path]

    @property
    def names(self) -> list[str | None]:
        """The base and every adapter."""
        return [None, *self.adapters]


def make(kind: str, folder: Path) -> Tiny:
    """A random model of a kind in KINDS with adapters of all the kinds of tiny.MIXED_ADAPTERS."""
    model_dir = tiny.make_model(kind, folder / "model", **KINDS[kind])
    _round(model_dir / "model.safetensors")
    adapters = tiny.make_adapters(model_dir, folder)
    for path in adapters.values():
        _round(path / "adapter_model.safetensors")
    return Tiny(model_dir, adapters)


def with_byte_tokenizer(model_dir: Path, folder: Path) -> Path:
    """The model again, with a tokenizer of three special tokens and then one for each byte. Returns its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    chars = {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    specials = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*specials, *(chars[byte] for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(parents=True)
    for file in model_dir.iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def load_engine(made: Tiny, **options: Any) -> Engine:
    """An engine over the model with all its adapters, on the device in bfloat16 unless `options` say otherwise."""
    engine = Engine.load(made.model_dir, **{"device": "cuda", "dtype": "bfloat16"} | options)
    for name, folder in made.adapters.items():
        engine.add_adapter(name, folder)
    return engine


class Peft:
    """transformers + PEFT on a device in one dtype, adapters included; one adapter at a time."""

    def __init__(self, made: Tiny, dtype: torch.dtype, device: str = "cuda") -> None:
        self._device = device
        self._model = AutoModelForCausalLM.from_pretrained(made.model_dir, dtype=dtype).to(device).eval()
        for name, folder in made.adapters.items():
            # PEFT's own default keeps adapters in float32.
            options = {"adapter_name": name, "autocast_adapter_dtype": False}
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(folder, **options)
            else:
                self._model = PeftModel.from_pretrained(self._model, folder, **options).eval()

    @torch.no_grad()
    def logprobs(self, request: Request, tokens: Sequence[int]) -> Tensor:
        """[n, V] float32 on the host: the distributions that the n tokens after the request's prompt are drawn from."""
        prompt = list(request.prompt_token_ids)
        ids = torch.tensor([[*prompt, *tokens]], device=self._device)
        if request.adapter is None:
            with self._model.disable_adapter():
                logits = self._model(ids).logits[0]
        else:
            self._model.set_adapter(request.adapter)
            logits = self._model(ids).logits[0]
        return logits[len(prompt) - 1 : -1].float().log_softmax(-1).cpu()


@cache
def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random token ids that are no end token."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def first_difference(one: Completion, other: Completion) -> int | None:
    """The place of the first token that differs, or None where one is the other."""
    pairs = zip(one.token_ids, other.token_ids, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if place is None and len(one.token_ids) != len(other.token_ids):
        return min(len(one.token_ids), len(other.token_ids))
    return place


def assert_same_but_for_ties(got: Sequence[Completion], wanted: Sequence[Completion]) -> int:
    """Greedy completions are equal, or part where two tokens are about as likely. Returns how many part."""
    num_parted = 0
    for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
        place = first_difference(one, other)
        if place is None:
            continue
        num_parted += 1
        assert place < min(len(one.token_ids), len(other.token_ids)), f"job {index}: one ends at token {place}"
        gap = abs(one.logprobs[place] - other.logprobs[place])
        assert gap < NEAR_TIE, (
            f"job {index}: tokens {one.token_ids[place]} and {other.token_ids[place]} at place {place} have"
            f" log-probabilities {one.logprobs[place]:.3f} and {other.logprobs[place]:.3f}"
        )
    return num_parted


def _round(path: Path) -> None:
    tensors = {name: tensor.bfloat16().float() for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
