"""What the engine tests share: one thread for torch, and tiny models and adapters made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama with tensors of all kinds, vocabulary tiny.VOCAB."""
    return tiny.make_model("llama3", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of tiny_model, of all the kinds of tiny.MIXED_ADAPTERS, by name."""
    return tiny.make_adapters(tiny_model, tmp_path_factory.mktemp("adapters"))
