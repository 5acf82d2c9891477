"""Forward passes against transformers + PEFT, and bit-equality of rows among neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stepping import Sequence, Stepper
from tiny import MIXED_ADAPTERS, MODELS, VOCAB, Judge, make_adapters, make_model, prompt

from medley.spec.base_models import UnsupportedModel
from medley_worker.engine.adapters import AdapterCache
from medley_worker.models import Decoder, load_model

TOLERANCE = 1e-4
NAMES: list[str | None] = [None, *MIXED_ADAPTERS]


def loaded(model_dir: Path, adapters: dict[str, Path]) -> tuple[Decoder, AdapterCache]:
    decoder = load_model(model_dir)
    num_tiles = 8 * 4 * 16  # eight adapters of rank 128 on four groups
    cache = AdapterCache(decoder.config, num_tiles=num_tiles, dtype=torch.float32)
    for name, folder in adapters.items():
        cache.register(("t", name), folder)
        cache.load(("t", name))
    cache.check_integrity()
    return decoder, cache


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small only lose by a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(MODELS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp(request.param)
    model_dir = make_model(request.param, folder / "model")
    return model_dir, make_adapters(model_dir, folder / "adapters")


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("llama")
    model_dir = make_model("llama3", folder / "model")
    return model_dir, make_adapters(model_dir, folder / "adapters")


def sequences(length: int = 45) -> list[Sequence]:
    return [Sequence(list(prompt(length - 3 * i, seed=i)), name) for i, name in enumerate(NAMES)]


@pytest.mark.parametrize("chunks", [[64], [13, 1], [1]], ids=["whole", "chunk_then_decode", "decode"])
def test_a_mixed_batch_gives_the_judges_logits(tiny: tuple[Path, dict[str, Path]], chunks: list[int]) -> None:
    model_dir, adapters = tiny
    judge = Judge(model_dir, adapters)
    stepper = Stepper(*loaded(model_dir, adapters))
    batch = sequences()
    for sequence, logits in zip(batch, stepper.logits(batch, chunks), strict=True):
        wanted = judge.logits(sequence.token_ids, sequence.adapter)
        assert (logits - wanted).abs().max() < TOLERANCE, sequence.adapter


def test_adapters_change_the_logits(tiny_llama: tuple[Path, dict[str, Path]]) -> None:
    stepper = Stepper(*loaded(*tiny_llama))
    batch = [Sequence(list(prompt(20)), name) for name in NAMES]
    base, *others = stepper.logits(batch, [64])
    assert all((logits - base).abs().max() > 0.05 for logits in others)


def test_a_rows_bits_do_not_depend_on_neighbours_chunks_or_phase(tiny: tuple[Path, dict[str, Path]]) -> None:
    decoder, cache = loaded(*tiny)
    alone = [Stepper(decoder, cache).logits([s], [27, 1])[0] for s in sequences()]
    for chunks, num_neighbours in (([27, 1], 8), ([64], 55), ([16, 7, 1], 3), ([1], 20)):
        stepper = Stepper(decoder, cache)
        stepper.shuffle_pages(seed=num_neighbours)
        crowd = [Sequence(list(prompt(9 + i % 20, seed=50 + i)), NAMES[i % len(NAMES)]) for i in range(num_neighbours)]
        together = stepper.logits([*sequences(), *crowd], chunks)
        for name, one, among in zip(NAMES, alone, together, strict=False):
            assert torch.equal(one, among), (name, chunks)


def test_threads_do_not_change_bits(tiny_llama: tuple[Path, dict[str, Path]]) -> None:
    decoder, cache = loaded(*tiny_llama)
    one = Stepper(decoder, cache).logits(sequences(60), [50, 5])
    torch.set_num_threads(2)
    two = Stepper(decoder, cache).logits(sequences(60), [50, 5])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_context_of_many_pages_has_the_same_bits_alone(tiny_llama: tuple[Path, dict[str, Path]]) -> None:
    decoder, cache = loaded(*tiny_llama)

    def mine() -> Sequence:
        return Sequence(list(prompt(150, seed=3)), "rank8")

    alone = Stepper(decoder, cache).logits([mine()], [140, 1])[0]
    long = Sequence(list(prompt(480, seed=4)), "rank1")
    among = Stepper(decoder, cache).logits([mine(), long], [470, 1])[0]
    assert torch.equal(alone, among)


def test_what_a_page_held_before_does_not_reach_its_next_owner(tiny_llama: tuple[Path, dict[str, Path]]) -> None:
    decoder, _ = loaded(*tiny_llama)
    clean = Stepper(decoder).logits([Sequence(list(prompt(21)))], [13, 1])[0]
    dirty = Stepper(decoder)
    dirty.kv.k[0].fill_(float("nan"))
    dirty.kv.v[1].fill_(float("nan"))
    assert torch.equal(dirty.logits([Sequence(list(prompt(21)))], [13, 1])[0], clean)


def test_a_shards_model_is_the_same_model(tmp_path: Path) -> None:
    whole = load_model(make_model("qwen3", tmp_path / "whole"))
    folder = make_model("qwen3", tmp_path / "sharded", sharded=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    one, two = (Stepper(m).logits([Sequence(list(prompt(12)))], [12])[0] for m in (whole, load_model(folder)))
    assert torch.equal(one, two)


def test_weights_that_do_not_fit_the_configuration_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_model("llama2", tmp_path / "model")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 88', '"intermediate_size": 96'))
    with pytest.raises(UnsupportedModel, match=r"mlp.down_proj.weight: got shape \(64, 88\), wanted shape \(64, 96\)"):
        load_model(folder)


def test_quantised_weights_without_a_word_of_it_are_refused_by_name(tmp_path: Path) -> None:
    folder = make_model("llama2", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"model.norm.weight: got dtype I8"):
        load_model(folder)


def test_random_weights_need_no_weight_files_and_follow_the_seed(tmp_path: Path) -> None:
    folder = make_model("qwen2", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    models = [load_model(folder, load_format="random", seed=seed) for seed in (0, 0, 1)]
    first, same, other = (Stepper(m).logits([Sequence(list(prompt(12)))], [12])[0] for m in models)
    assert first.shape == (12, VOCAB)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_half_precision_stays_near_float32(tiny_llama: tuple[Path, dict[str, Path]]) -> None:
    model_dir, adapters = tiny_llama
    exact = Stepper(*loaded(model_dir, adapters)).logits(sequences(), [64])
    decoder = load_model(model_dir, dtype=torch.bfloat16)
    cache = AdapterCache(decoder.config, num_tiles=512, dtype=torch.bfloat16)
    for name, folder in adapters.items():
        cache.register(("t", name), folder)
        cache.load(("t", name))
    for one, two in zip(exact, Stepper(decoder, cache).logits(sequences(), [64]), strict=True):
        assert (one - two).abs().mean() < 0.1 * one.std()
