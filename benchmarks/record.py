"""The form of a result: machine, date, versions, command, rows."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "celery", "redis", "sqlalchemy", "psycopg", "fastapi", "uvicorn")


def machine() -> str:
    """A short name of this machine's kind: cores and processor family."""
    return f"{os.cpu_count()}core-{platform.machine()}"


def gpu_name(device_name: str) -> str:
    """The short name of a device: `h200` for "NVIDIA H200"."""
    words = device_name.lower().removeprefix("nvidia ").split()
    return next((word for word in words if word.startswith(("h100", "h200"))), "-".join(words))


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def write(
    what: str,
    command: str,
    rows: Sequence[dict[str, Any]],
    notes: Sequence[str] = (),
    *,
    name: str | None = None,
    folder: Path | None = None,
) -> Path:
    """Writes `<machine>-<what>.json` to `folder` (`results`) and returns its path. name: of the machine's kind."""
    name = name or machine()
    return save(heading(what, command, notes, name=name) | {"rows": list(rows)}, f"{name}-{what}", folder)


def heading(what: str, command: str, notes: Sequence[str], *, name: str) -> dict[str, Any]:
    """What every result says of itself: where, when, with what, by which command."""
    versions = {package: _version(package) for package in PACKAGES}
    versions["python"] = platform.python_version()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "what": what,
        "machine": {"name": name, "processor": processor(), "cores": os.cpu_count(), "memory_gib": round(memory)},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": versions,
        "command": command,
        "notes": list(notes),
    }


def save(document: dict[str, Any], name: str, folder: Path | None = None) -> Path:
    """Writes `<name>.json` to `folder` (`results`) and returns its path."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
