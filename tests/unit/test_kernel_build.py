"""Builds of the CUDA kernels, with a stand-in for nvcc: once a recipe, and nothing half done is taken for whole."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medley_worker.ops import build as kernel_build
from medley_worker.ops.build import FLAGS, LIBRARY, BuildFailed, Recipe, build

# Notes each call, waits while the file "hold" is there, fails while "broken" is, and writes what -o names.
NVCC = """#!/bin/sh
here=$(dirname "$0")
echo called >> "$here/calls"
while [ -e "$here/hold" ]; do sleep 0.05; done
if [ -e "$here/broken" ]; then echo "error: expected a semicolon"; exit 2; fi
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
echo built > "$out"
"""
# A process of its own, which a test can kill.
BUILD = """
import json, sys
from pathlib import Path
from medley_worker.ops.build import Recipe, build
source, header, nvcc, folder = map(Path, json.loads(sys.argv[1]))
build(Recipe((source,), (header,), ("90",), str(nvcc), "13.0"), folder)
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    nvcc, source, header = tmp_path / "nvcc", tmp_path / "one.cu", tmp_path / "one.h"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    source.write_text("int one() { return 1; }")
    header.write_text("int one();")
    return Recipe((source,), (header,), ("90",), str(nvcc), "13.0")


def num_calls(recipe: Recipe) -> int:
    calls = Path(recipe.nvcc).with_name("calls")
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_what_is_built_is_not_built_again(recipe: Recipe, tmp_path: Path) -> None:
    built = build(recipe, tmp_path / "out")
    assert built.read_text() == "built\n"
    assert num_calls(recipe) == 2  # a source, and the link
    assert build(recipe, tmp_path / "out") == built
    assert num_calls(recipe) == 2


def test_the_key_tells_sources_headers_architectures_and_cuda_apart(recipe: Recipe) -> None:
    keys = {recipe.key}
    keys.add(dataclasses.replace(recipe, architectures=("80", "90")).key)
    keys.add(dataclasses.replace(recipe, cuda_version="13.1").key)
    recipe.sources[0].write_text("int one() { return 2; }")
    keys.add(recipe.key)
    recipe.headers[0].write_text("long one();")
    keys.add(recipe.key)
    assert len(keys) == 5


def test_a_build_that_was_killed_leaves_nothing_that_is_taken_for_a_library(recipe: Recipe, tmp_path: Path) -> None:
    hold, folder = Path(recipe.nvcc).with_name("hold"), tmp_path / "out"
    hold.touch()
    paths = [str(p) for p in (recipe.sources[0], recipe.headers[0], recipe.nvcc, folder)]
    process = subprocess.Popen([sys.executable, "-c", BUILD, json.dumps(paths)], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not num_calls(recipe):
            assert process.poll() is None, "the build ended by itself"
            assert time.monotonic() < deadline, "the compiler was not called"
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert list(folder.glob("build-*"))
    assert not (folder / LIBRARY).exists()
    hold.unlink()
    assert build(recipe, folder).read_text() == "built\n"
    assert not list(folder.glob("build-*"))


def test_a_compilers_error_is_told_and_a_later_build_succeeds(recipe: Recipe, tmp_path: Path) -> None:
    broken = Path(recipe.nvcc).with_name("broken")
    broken.touch()
    with pytest.raises(BuildFailed, match="expected a semicolon"):
        build(recipe, tmp_path / "out")
    assert not (tmp_path / "out" / LIBRARY).exists()
    broken.unlink()
    assert build(recipe, tmp_path / "out").is_file()


def test_what_was_built_ahead_serves_its_own_sources_flags_architectures_and_cuda(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = tmp_path / "built"
    monkeypatch.setattr(kernel_build, "_AHEAD", ahead)
    find = kernel_build._built_ahead
    assert find(recipe.source_key, "90", "13.0") is None
    library = build(recipe, ahead)
    assert find(recipe.source_key, "90", "13.0") == library
    assert find(recipe.source_key, "100", "13.0") == library
    assert find(recipe.source_key, "90", None) == library  # a machine without a compiler
    assert find(recipe.source_key, "90", "13.1") is None
    assert find(recipe.source_key, "80", "13.0") is None
    assert find("of other sources", "90", "13.0") is None
    monkeypatch.setattr(kernel_build, "FLAGS", (*FLAGS, "-lineinfo"))
    assert find(recipe.source_key, "90", "13.0") is None
