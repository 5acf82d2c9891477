"""Counts what the engine has done; `EngineStats` is the picture that leaves it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Totals since the engine started. rows, adapters: sums over steps, so that their means are per step."""

    steps: int = 0
    step_s: float = 0.0
    rows: int = 0
    adapters: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
