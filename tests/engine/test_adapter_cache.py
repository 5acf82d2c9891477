"""Adapters from disk to tiles: loads, evictions, refusals, and the same results after a reload."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stepping import Sequence, Stepper
from tiny import TinyAdapter, copy_adapter, make_adapter, make_model, prompt

from medley_worker.engine.adapters import AdapterCache, AdapterKey, AdapterTooLarge, AdapterUnavailable
from medley_worker.models import Decoder, load_model

TILES_OF_RANK8 = 4  # one a projection group


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    model = make_model("llama3", folder / "model")
    make_adapter(model, folder / "0", TinyAdapter())
    for i in range(1, 6):
        copy_adapter(folder / "0", folder / str(i), seed=i)
    make_adapter(model, folder / "large", TinyAdapter(r=64))
    return folder


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return load_model(folder / "model")


def key(name: str) -> AdapterKey:
    return ("t", name)


def new_cache(
    decoder: Decoder, folder: Path, num_tiles: int = 3 * TILES_OF_RANK8, host_bytes: int = 1 << 30
) -> AdapterCache:
    cache = AdapterCache(decoder.config, num_tiles=num_tiles, dtype=torch.float32, host_bytes=host_bytes)
    for i in range(6):
        cache.register(key(str(i)), folder / str(i))
    return cache


@pytest.mark.parametrize("host_bytes", [1 << 30, 0], ids=["host copies", "from disk"])
def test_more_adapters_than_fit_give_the_same_logits_after_every_reload(
    decoder: Decoder, folder: Path, host_bytes: int
) -> None:
    roomy = new_cache(decoder, folder, num_tiles=64)
    wanted = []
    for i in range(6):
        roomy.load(key(str(i)))
        wanted.append(Stepper(decoder, roomy).logits([Sequence(list(prompt(9)), str(i))], [5, 1])[0])
    assert not torch.equal(wanted[0], wanted[1])
    cache = new_cache(decoder, folder, host_bytes=host_bytes)
    for i in (0, 1, 2, 3, 4, 5, 0, 3, 0, 5, 1):
        assert cache.can_admit(key(str(i)))
        cache.load(key(str(i)))
        cache.check_integrity()
        got = Stepper(decoder, cache).logits([Sequence(list(prompt(9)), str(i))], [5, 1])[0]
        assert torch.equal(got, wanted[i])
    assert cache.loads == 9
    assert cache.evictions == 6
    assert cache.load_s > 0


def test_what_comes_next_is_kept_and_pinned_adapters_are_never_evicted(decoder: Decoder, folder: Path) -> None:
    cache = new_cache(decoder, folder)
    for i in range(3):
        cache.load(key(str(i)))
    cache.pin(key("0"))
    cache.set_upcoming([key("3"), key("1"), key("2")])
    cache.load(key("3"))
    assert set(cache.resident()) == {key("0"), key("1"), key("3")}
    cache.pin(key("1"))
    cache.pin(key("3"))
    assert not cache.can_admit(key("4"))
    cache.unpin(key("1"))
    assert cache.can_admit(key("4"))
    cache.check_integrity()


def test_an_adapter_that_can_never_fit_is_refused_with_both_numbers(decoder: Decoder, folder: Path) -> None:
    cache = new_cache(decoder, folder)
    with pytest.raises(AdapterTooLarge, match="needs 32 tiles, the engine has 12") as error:
        cache.register(key("large"), folder / "large")
    assert (error.value.got, error.value.wanted) == (32, 12)


def test_files_that_cannot_be_read_make_an_adapter_unavailable(decoder: Decoder, folder: Path, tmp_path: Path) -> None:
    cache = new_cache(decoder, folder)
    with pytest.raises(AdapterUnavailable):
        cache.register(key("missing"), tmp_path / "missing")
    copy_adapter(folder / "0", tmp_path / "gone", seed=9)
    cache.register(key("gone"), tmp_path / "gone")
    (tmp_path / "gone" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterUnavailable):
        cache.load(key("gone"))
    cache.check_integrity()
    assert cache.tiles_used == 0


def test_a_forgotten_adapter_leaves_nothing_behind(decoder: Decoder, folder: Path) -> None:
    cache = new_cache(decoder, folder)
    cache.load(key("0"))
    cache.forget(key("0"))
    assert cache.tiles_used == 0
    assert not cache.is_registered(key("0"))
    cache.check_integrity()


def test_values_that_the_dtype_cannot_hold_make_an_adapter_unavailable(
    decoder: Decoder, folder: Path, tmp_path: Path
) -> None:
    copied = copy_adapter(folder / "0", tmp_path / "wide", seed=3)
    weights = load_file(copied / "adapter_model.safetensors")
    save_file({name: tensor * 1e9 for name, tensor in weights.items()}, copied / "adapter_model.safetensors")
    cache = AdapterCache(decoder.config, num_tiles=64, dtype=torch.float16)
    cache.register(key("wide"), copied)
    with pytest.raises(AdapterUnavailable, match="infinity"):
        cache.load(key("wide"))
    cache.check_integrity()


def test_pruning_keeps_what_is_resident_or_wanted(decoder: Decoder, folder: Path) -> None:
    cache = new_cache(decoder, folder)
    cache.load(key("0"))
    cache.prune(lambda known: known == key("1"))
    assert cache.num_registered == 2
    assert cache.is_registered(key("0"))
    assert cache.is_registered(key("1"))
    cache.check_integrity()
