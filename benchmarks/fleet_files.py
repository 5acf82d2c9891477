"""The model and the adapters of the fleet benchmark as files: `python -m benchmarks.fleet_files --shape 7b ...`

Random weights in a Hugging Face folder with a tokenizer of as many tokens, and random adapters as PEFT saves them, a
folder a tenant. A few adapters differ; the others are the same files under other names, which the service takes in
and the engine loads like any others. It runs in a process of its own, so that what it holds of a GPU is given back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks.gpu.shapes import base_model
from medley.demo import ADAPTERS_DIR, MODEL_DIR
from medley.demo.skills import SKILLS
from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME
from medley.spec.base_models import BaseModel

SHARD_BYTES = 2 << 30
WEIGHT_STD = 0.02
NUM_DIFFERENT = 32
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")


def make_files(shape: str, folder: Path, tenants: dict[str, int], device: str) -> tuple[Path, dict[str, Path]]:
    """The model's folder, and by tenant a folder of as many adapters as are wanted, made where they are not there."""
    if shape == "demo":
        return MODEL_DIR, {name: _demo_adapters(folder / "adapters" / name, num) for name, num in tenants.items()}
    counts = [f"--tenant={name}={num}" for name, num in tenants.items()]
    where = [f"--shape={shape}", f"--folder={folder}", f"--device={device}"]
    subprocess.run([sys.executable, "-m", "benchmarks.fleet_files", *where, *counts], check=True)
    return folder / "model", {name: folder / "adapters" / name for name in tenants}


def _demo_adapters(folder: Path, num_adapters: int) -> Path:
    """The demo's, again and again under other names."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_adapters):
        link = folder / _name(number)
        if not link.exists():
            link.symlink_to(ADAPTERS_DIR / SKILLS[number % len(SKILLS)].name, target_is_directory=True)
    return folder


def _name(number: int) -> str:
    return f"adapter-{number:03}"


def write_model(shape: str, folder: Path, device: str) -> BaseModel:
    """A model of `shapes` with random weights in bf16, in shards."""
    import torch
    from safetensors.torch import save_file

    model = base_model(shape, folder)
    generator = torch.Generator(device=device).manual_seed(0)
    places: dict[str, str] = {}
    for number, shapes in enumerate(_shards(model)):
        name = f"model-{number:05}.safetensors"
        tensors = {}
        for tensor, size in shapes.items():
            weight = torch.empty(size, dtype=torch.bfloat16, device=device)
            is_norm = tensor.endswith("norm.weight")
            tensors[tensor] = (
                weight.fill_(1) if is_norm else weight.normal_(std=WEIGHT_STD, generator=generator)
            ).cpu()
            places[tensor] = name
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_tokenizer(folder, model.vocab_size)
    return model


def _shards(model: BaseModel) -> Iterator[dict[str, tuple[int, ...]]]:
    """The tensors' shapes, cut where a file is large enough."""
    import math

    from medley_worker.models.loading import tensor_shapes

    shard: dict[str, tuple[int, ...]] = {}
    for name, size in tensor_shapes(model).items():
        shard[name] = size
        if sum(2 * math.prod(size) for size in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A token a byte, and words without meaning for the rest of the vocabulary, so that every answer is a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"w{number}" for number in range(len(tokens), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={token: id_ for id_, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))


def write_adapters(model: BaseModel, folder: Path, tenants: dict[str, int], device: str) -> None:
    """Adapters of rank 16 on all seven projections, below a folder of each tenant."""
    from benchmarks.gpu.peft_files import save_random

    made = 0
    for tenant, num_adapters in tenants.items():
        for number in range(num_adapters):
            source, target = folder / "different" / str(made % NUM_DIFFERENT), folder / tenant / _name(number)
            if not source.exists():
                save_random(model, source, seed=made, device=device)
            target.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                if not (target / name).exists():
                    os.link(source / name, target / name)
            made += 1


@click.command()
@click.option("--shape", required=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--tenant", "tenants", multiple=True, help="NAME=ADAPTERS")
def main(shape: str, folder: Path, device: str, tenants: tuple[str, ...]) -> None:
    """Write `model` and `adapters` below the folder, where they are not there."""
    if (folder / "model" / "tokenizer.json").exists():
        model = base_model(shape, folder / "model")
    else:
        model = write_model(shape, folder / "model", device)
    counts = {name: int(number) for name, _, number in (tenant.partition("=") for tenant in tenants)}
    write_adapters(model, folder / "adapters", counts, device)


if __name__ == "__main__":
    main()
