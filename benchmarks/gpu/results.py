"""Rows of a GPU figure: written to `<gpu>-<what>.json` as they are measured, merged with those that are there.

A row is known by its key fields, so a part can be run again and goes on where its time ran out. Knows no engine.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.record import RESULTS, gpu_name, processor, say

PACKAGES = ("torch", "flashinfer-python", "transformers", "peft", "safetensors", "numpy")
DEFAULT_BUDGET_S = 460.0

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """How a part was asked to run: where rows go, which are measured again, until when.

    deadline: on `time.monotonic`'s clock.
    """

    out: Path
    again: bool
    deadline: float

    def has_time_for(self, seconds: float) -> bool:
        """Whether so much of the budget is left; says so where it is not."""
        left = self.deadline - time.monotonic()
        if left < seconds:
            say(f"{left:.0f} s of the budget are left, {seconds:.0f} are wanted: run the part again for the other rows")
        return left >= seconds


def part_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that all parts share; the command gets a `Run` as `run`."""

    @functools.wraps(command)
    def main(out: Path, again: bool, budget_s: float, **options: Any) -> None:
        if not torch.cuda.is_available():
            raise click.ClickException("torch finds no CUDA device here")
        command(run=Run(out, again, time.monotonic() + budget_s), **options)

    to = click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Folder of the results.")
    anew = click.option("--again", is_flag=True, help="Measure rows that are there once more.")
    budget = click.option("--budget-s", default=DEFAULT_BUDGET_S, show_default=True, help="Stop after so many seconds.")
    return to(anew(budget(main)))


class Figure:
    """One file of rows. key: the fields that tell rows apart."""

    def __init__(
        self,
        what: str,
        key: Sequence[str],
        run: Run,
        *,
        notes: Sequence[str] = (),
        device: str = "",
        num_devices: int = 1,
    ) -> None:
        """device: its full name; that of torch's current device where it is not given. num_devices: of that kind."""
        self._what, self._key, self._again = what, tuple(key), run.again
        self._device = device or torch.cuda.get_device_name()
        self._notes = list(notes)
        several = f"x{num_devices}" if num_devices > 1 else ""
        self.path = run.out / f"{gpu_name(self._device)}{several}-{what}.json"
        self._rows: dict[tuple[Any, ...], Row] = {}
        self._measured: set[tuple[Any, ...]] = set()
        if self.path.exists():
            for row in json.loads(self.path.read_text())["rows"]:
                self._rows[self._key_of(row)] = row

    def wants(self, **key: Any) -> bool:
        """Whether this row is still to be measured by this run."""
        at = self._key_of(key)
        return at not in self._measured if self._again else at not in self._rows

    def get(self, **key: Any) -> Row | None:
        """A row that is there."""
        return self._rows.get(self._key_of(key))

    def put(self, row: Row) -> None:
        """Write a row to the file; one with the same key is replaced where it stands."""
        self._rows[self._key_of(row)] = row
        self._write()

    def add(self, row: Row) -> None:
        """`put` what was measured just now, and say so."""
        self._measured.add(self._key_of(row))
        self.put(row)
        say(f"{self._what}: " + ", ".join(f"{name} {value}" for name, value in row.items()))

    def _key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in self._key)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "what": self._what,
            "machine": _machine(self._device),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "versions": _versions(),
            "command": _command(),
            "notes": self._notes,
            "rows": list(self._rows.values()),
        }
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1) + "\n")
        partial.replace(self.path)  # a run that is killed leaves the rows before


def _machine(device: str) -> Row:
    machine: Row = {"name": gpu_name(device), "gpu": device, "processor": processor(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        machine |= {"gpu_memory_gib": round(properties.total_memory / 2**30), "sms": properties.multi_processor_count}
    return machine


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _command() -> str:
    """What makes these rows again; the folder they went to is not part of it."""
    module, arguments = Path(sys.argv[0]).stem, sys.argv[1:]
    if "--out" in arguments:
        at = arguments.index("--out")
        del arguments[at : at + 2]
    return shlex.join(["python", "-m", f"benchmarks.gpu.{module}", *arguments])
