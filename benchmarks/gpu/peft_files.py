"""Random adapters of a model as PEFT saves them, in memory's file system where there is room.

A few different ones are written; the others are the same files under other names, which the engine loads like any
others: how long a step takes does not depend on what the weights are.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import torch
from safetensors.torch import save_file

from benchmarks.gpu.shapes import adapter_weight_bytes
from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME
from medley.spec.base_models import BaseModel, linear_sites
from medley.spec.wire import AdapterRef

RANK = 16
NUM_DIFFERENT = 8
WEIGHT_STD = 0.02
SHARED_MEMORY = Path("/dev/shm")
TENANT = UUID(int=1)


class AdapterFiles:
    """Folders of adapters 0, 1, ... of rank 16 on all seven projections, bf16, made when first asked for."""

    def __init__(self, model: BaseModel, folder: Path, num_different: int = NUM_DIFFERENT) -> None:
        self._model, self._folder, self._num_different = model, folder, num_different

    def ref(self, number: int) -> AdapterRef:
        """What a request names. An engine reads these files without the checks of an upload."""
        return AdapterRef(TENANT, UUID(int=number + 1), str(self.path(number)))

    def path(self, number: int) -> Path:
        """The folder of an adapter."""
        folder = self._folder / f"adapter-{number}"
        if folder.exists():
            return folder
        source = number % self._num_different
        if source == number:
            save_random(self._model, folder, seed=number)
        else:
            same = self.path(source)
            folder.mkdir(parents=True)
            for name in (CONFIG_NAME, WEIGHTS_NAME):
                os.link(same / name, folder / name)
        return folder


def save_random(model: BaseModel, folder: Path, *, seed: int, device: str = "cuda") -> None:
    """One random adapter, made on the device."""
    folder.mkdir(parents=True)
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        numbers = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return numbers.normal_(std=WEIGHT_STD, generator=generator).cpu()

    tensors: dict[str, torch.Tensor] = {}
    for layer in range(model.num_layers):
        for site in linear_sites(model):
            at = f"base_model.model.model.layers.{layer}.{site.path}"
            tensors[f"{at}.lora_A.weight"] = normal(RANK, site.in_features)
            tensors[f"{at}.lora_B.weight"] = normal(site.out_features, RANK)
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": [site.name for site in linear_sites(model)],
    }
    (folder / CONFIG_NAME).write_text(json.dumps(config))


@contextmanager
def adapter_files(
    model: BaseModel, *, on_disk: bool = False, num_different: int = NUM_DIFFERENT
) -> Iterator[AdapterFiles]:
    """AdapterFiles in a folder of their own, gone afterwards. on_disk: where temporary files lie by default."""
    wanted = (num_different + 1) * adapter_weight_bytes(model, RANK)
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > wanted
    parent = SHARED_MEMORY if has_room and not on_disk else None
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        yield AdapterFiles(model, Path(folder), num_different)
