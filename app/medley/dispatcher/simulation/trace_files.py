"""Traces as files: JSON lines, a job a line, in any order, so that a user can replay what he has recorded.

    {"at_s": 0.25, "tenant": "acme", "adapter": "fr-7", "prompt_tokens": 181, "output_tokens": 64, "max_tokens": 128}

at_s: seconds from the trace's start. adapter: absent or null for the base. max_tokens: what the job may generate, as
its submitter said (output_tokens where absent). priority: "low", "normal" (the default) or "high". Names are numbered
as they come; an adapter is one tenant's, equal names of two tenants are two adapters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from medley.dispatcher.simulation.traces import BASE, Trace

PRIORITIES = {"low": 0, "normal": 1, "high": 2}
MAX_FAULTS = 20


class Line(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    at_s: float
    tenant: str
    adapter: str | None = None
    prompt_tokens: int
    output_tokens: int
    max_tokens: int | None = None
    priority: Literal["low", "normal", "high"] = "normal"


class TraceRefused(Exception):
    """A file is no trace; `faults` says where and why."""

    def __init__(self, path: Path, faults: list[str]) -> None:
        super().__init__(f"{path} is not a trace:\n" + "\n".join(faults))
        self.faults = faults


def read(path: Path) -> Trace:
    """The trace in `path`. Raises TraceRefused with its faults (the first twenty)."""
    decoder = msgspec.json.Decoder(Line)
    lines, faults = [], []
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = decoder.decode(text)
                faults += [f"line {number}: {fault}" for fault in _faults(line)]
            except msgspec.MsgspecError as error:
                faults.append(f"line {number}: {error}")
            else:
                lines.append(line)
            if len(faults) >= MAX_FAULTS:
                break
    if not lines and not faults:
        faults.append("it has no lines")
    if faults:
        raise TraceRefused(path, faults)
    return _trace(path.stem, lines)


def _faults(line: Line) -> Iterator[str]:
    if not 0 <= line.at_s < 1e9:
        yield f"at_s: got {line.at_s}, wanted seconds from 0 on"
    if line.prompt_tokens < 1:
        yield f"prompt_tokens: got {line.prompt_tokens}, wanted at least 1"
    if line.output_tokens < 1:
        yield f"output_tokens: got {line.output_tokens}, wanted at least 1"
    if line.max_tokens is not None and line.max_tokens < line.output_tokens:
        yield f"max_tokens: got {line.max_tokens}, wanted at least output_tokens ({line.output_tokens})"


def _trace(name: str, lines: list[Line]) -> Trace:
    lines = sorted(lines, key=lambda line: line.at_s)
    tenants: dict[str, int] = {}
    adapters: dict[tuple[str, str], int] = {}
    tenant = [tenants.setdefault(line.tenant, len(tenants)) for line in lines]
    adapter = [
        BASE if line.adapter is None else adapters.setdefault((line.tenant, line.adapter), len(adapters))
        for line in lines
    ]
    numbers = {
        "tenant": tenant,
        "adapter": adapter,
        "prompt_tokens": [line.prompt_tokens for line in lines],
        "output_tokens": [line.output_tokens for line in lines],
        "max_tokens": [line.max_tokens or line.output_tokens for line in lines],
        "priority": [PRIORITIES[line.priority] for line in lines],
    }
    columns = {field: np.array(values, np.int64) for field, values in numbers.items()}
    return Trace(name=name, arrived_s=np.array([line.at_s for line in lines]), **columns)


def write(trace: Trace, path: Path) -> None:
    """Writes `trace` in the form that `read` takes."""
    priorities: dict[int, Literal["low", "normal", "high"]] = {0: "low", 1: "normal", 2: "high"}
    encoder = msgspec.json.Encoder()
    columns = (
        trace.arrived_s,
        trace.tenant,
        trace.adapter,
        trace.prompt_tokens,
        trace.output_tokens,
        trace.max_tokens,
        trace.priority,
    )
    with path.open("wb") as file:
        for at_s, tenant, adapter, prompt, output, limit, priority in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            line = Line(
                at_s=round(at_s, 6),
                tenant=f"t{tenant}",
                adapter=None if adapter == BASE else f"a{adapter}",
                prompt_tokens=prompt,
                output_tokens=output,
                max_tokens=limit,
                priority=priorities[priority],
            )
            file.write(encoder.encode(line) + b"\n")
