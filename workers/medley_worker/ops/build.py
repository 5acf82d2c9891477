"""Builds csrc into one shared library with nvcc through ninja; finds the one that is built already.

A library is keyed by its sources, flags, GPU architectures and the CUDA version, and appears under its name only
when it is whole: a build that was killed leaves nothing that could be taken for one. `python -m
medley_worker.ops.build` builds ahead of time, for every architecture that it is asked for, into the package, where
a machine without a compiler finds it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC")
ARCHITECTURES = ("80", "90")  # ahead of time; newer GPUs run the PTX of the last
LIBRARY = "libmedley.so"
NO_NVCC = "nvcc: not on the PATH, in CUDA_HOME or in /usr/local/cuda; wanted to build csrc"
_PACKAGE = Path(__file__).parent
_SOURCE_FOLDERS = (_PACKAGE.parents[2] / "csrc", _PACKAGE / "csrc")
_AHEAD = _PACKAGE / "built"


class BuildFailed(RuntimeError):
    """The kernels could not be built; the message holds the compiler's words."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides what a build gives."""

    sources: tuple[Path, ...]
    headers: tuple[Path, ...]
    architectures: tuple[str, ...]
    nvcc: str
    cuda_version: str

    @property
    def source_key(self) -> str:
        digest = hashlib.sha256()
        for path in (*self.sources, *self.headers):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()[:16]

    @property
    def key(self) -> str:
        text = json.dumps([self.source_key, FLAGS, self.architectures, self.cuda_version])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def library(architecture: str) -> Path:
    """The library for a GPU of compute capability `architecture` ("90"): built ahead of time, before, or now.

    Raises BuildFailed.
    """
    sources, headers = _sources()
    nvcc = _nvcc()
    version = None if nvcc is None else _cuda_version(nvcc)
    ahead = _built_ahead(Recipe(sources, headers, (), "", "").source_key, architecture, version)
    if ahead is not None:
        return ahead
    if nvcc is None or version is None:
        raise BuildFailed(NO_NVCC)
    recipe = Recipe(sources, headers, (architecture,), nvcc, version)
    return build(recipe, cache_folder() / recipe.key)


def cache_folder() -> Path:
    """Where libraries built at first use lie: MEDLEY_KERNEL_CACHE, or medley/kernels in the user's cache folder."""
    if chosen := os.environ.get("MEDLEY_KERNEL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medley" / "kernels"


def build(recipe: Recipe, folder: Path) -> Path:
    """Build into `folder` unless it is there already; processes that ask at once build once. Raises BuildFailed."""
    finished = folder / LIBRARY
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if finished.is_file():
            return finished
        for left_over in folder.glob("build-*"):  # of a build that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
        try:
            (work / "build.ninja").write_text(_ninja_file(recipe))
            _run([_find_ninja(), "-C", str(work)])
            (folder / "manifest.json").write_text(json.dumps(_manifest(recipe)))
            (work / LIBRARY).replace(finished)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return finished


def _manifest(recipe: Recipe) -> dict[str, object]:
    return {
        "sources": recipe.source_key,
        "architectures": recipe.architectures,
        "cuda": recipe.cuda_version,
        "flags": FLAGS,
    }


def _built_ahead(source_key: str, architecture: str, cuda_version: str | None) -> Path | None:
    """cuda_version: of the nvcc here; None where there is none, and what was built elsewhere must do."""
    with suppress(FileNotFoundError):
        manifest = json.loads((_AHEAD / "manifest.json").read_text())
        is_fit = any(int(known) <= int(architecture) for known in manifest["architectures"])
        is_same = (manifest["sources"], manifest["flags"]) == (source_key, list(FLAGS))
        is_same = is_same and cuda_version in (None, manifest["cuda"])
        if is_same and is_fit and (_AHEAD / LIBRARY).is_file():
            return _AHEAD / LIBRARY
    return None


def _sources() -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    for folder in _SOURCE_FOLDERS:
        sources = tuple(sorted(folder.glob("*.cu")))
        if sources:
            return sources, tuple(sorted((*folder.glob("*.h"), *folder.glob("*.cuh"))))
    raise BuildFailed(f"no CUDA sources in {' or '.join(map(str, _SOURCE_FOLDERS))}")


def _ninja_file(recipe: Recipe) -> str:
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in recipe.architectures]
    last = recipe.architectures[-1]
    codes.append(f"-gencode=arch=compute_{last},code=compute_{last}")
    headers = " ".join(_escaped(path) for path in recipe.headers)
    lines = [
        "rule compile",
        f"  command = {recipe.nvcc} {' '.join((*FLAGS, *codes))} -c $in -o $out",
        "rule link",
        f"  command = {recipe.nvcc} -shared $in -o $out",
    ]
    objects = [f"{source.stem}.o" for source in recipe.sources]
    for source, target in zip(recipe.sources, objects, strict=True):
        lines.append(f"build {target}: compile {_escaped(source)} | {headers}")
    lines.append(f"build {LIBRARY}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def _escaped(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def _find_ninja() -> str:
    beside = Path(sys.executable).with_name("ninja")
    found = str(beside) if beside.is_file() else shutil.which("ninja")
    if found is None:
        raise BuildFailed("ninja: not beside python and not on the PATH; pip install ninja")
    return found


def _cuda_version(nvcc: str) -> str:
    return _run([nvcc, "--version"]).strip().splitlines()[-1]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildFailed(f"{command[0]} failed with {done.returncode}:\n{(done.stdout + done.stderr)[-8000:]}")
    return done.stdout


def main() -> None:
    """Build ahead of time."""
    parser = argparse.ArgumentParser(description="Build the CUDA kernels ahead of time.")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES), help="compute capabilities, such as 80 90")
    parser.add_argument("--out", type=Path, default=_AHEAD, help="folder of the library")
    arguments = parser.parse_args()
    sources, headers = _sources()
    nvcc = _nvcc()
    if nvcc is None:
        raise BuildFailed(NO_NVCC)
    recipe = Recipe(sources, headers, tuple(sorted(arguments.arch, key=int)), nvcc, _cuda_version(nvcc))
    (arguments.out / LIBRARY).unlink(missing_ok=True)
    sys.stdout.write(f"{build(recipe, arguments.out)}\n")


if __name__ == "__main__":
    main()
