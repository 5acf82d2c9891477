"""Workers of a `medley up` over the GPUs of its machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from medley.local.gpus import gpu_environ, visible_gpus

TWO = """GPU 0: NVIDIA H200 (UUID: GPU-11111111-2222-3333-4444-555555555555)
GPU 1: NVIDIA H200 (UUID: GPU-66666666-7777-8888-9999-000000000000)
"""
CUDA = {"MEDLEY_DEVICE": "cuda"}


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine whose nvidia-smi tells of two."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{TWO}END\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return ["GPU-11111111-2222-3333-4444-555555555555", "GPU-66666666-7777-8888-9999-000000000000"]


def test_each_worker_sees_one_gpu_and_they_take_turns(two_gpus: list[str]) -> None:
    gpus = visible_gpus(CUDA)
    assert gpus == two_gpus
    assert [gpu_environ(n, 2, gpus, CUDA) for n in range(2)] == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in two_gpus]


def test_workers_that_share_a_gpu_share_its_memory(two_gpus: list[str]) -> None:
    given = [gpu_environ(n, 3, two_gpus, CUDA) for n in range(3)]
    assert [env["CUDA_VISIBLE_DEVICES"] for env in given] == [two_gpus[0], two_gpus[1], two_gpus[0]]
    assert [env.get("MEDLEY_GPU_SHARE") for env in given] == ["0.475", None, "0.475"]
    said = {**CUDA, "MEDLEY_GPU_SHARE": "0.3"}
    assert "MEDLEY_GPU_SHARE" not in gpu_environ(0, 3, two_gpus, said), "what was said stands"


def test_gpus_that_are_hidden_are_left_alone(two_gpus: list[str]) -> None:
    assert two_gpus
    assert visible_gpus({**CUDA, "CUDA_VISIBLE_DEVICES": "3, 5"}) == ["3", "5"]
    assert visible_gpus({**CUDA, "CUDA_VISIBLE_DEVICES": ""}) == []


def test_another_device_or_a_machine_without_gpus_changes_nothing(
    two_gpus: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert two_gpus
    assert visible_gpus({}) == visible_gpus({"MEDLEY_DEVICE": "cuda:1"}) == []
    assert gpu_environ(0, 2, [], CUDA) == {}
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert visible_gpus(CUDA) == []
