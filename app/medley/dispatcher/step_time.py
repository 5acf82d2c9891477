"""How long a step takes: a linear model of rows, adapters and prompt tokens, and its fit from workers' totals.

It knows no workers by name and keeps no samples: totals come in, sums of products stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

NUM_TERMS = 5
MEMORY = 500.0  # reports after which an old one weighs 1/e
MIN_REPORTS = 4
HUBER = 3.0  # errors beyond this many times the usual one count with their root only
RIDGE = 1e-6  # of the scaled products: decides only what the reports leave open


class StepTime(msgspec.Struct, frozen=True):
    """Seconds of a step: base + rows, + any adapter, + distinct adapters, + prompt tokens computed in it."""

    base_s: float
    row_s: float
    lora_s: float
    adapter_s: float
    prompt_token_s: float

    def step_s(self, rows: float, adapters: float, prompt_tokens: float = 0.0) -> float:
        """Of a step with so many rows and distinct adapters (means of several steps will do)."""
        return (
            self.base_s
            + self.row_s * rows
            + self.lora_s * min(1.0, adapters)
            + self.adapter_s * adapters
            + self.prompt_token_s * prompt_tokens
        )

    def jobs_per_s(self, rows: float, adapters: float, steps_a_job: float, prompt_tokens_a_job: float = 0.0) -> float:
        """What a worker finishes with `rows` rows taken throughout, where a job is in `steps_a_job` steps."""
        a_job_s = steps_a_job * self.step_s(rows, adapters) / rows + self.prompt_token_s * prompt_tokens_a_job
        return 1.0 / a_job_s


# Llama-2-7B, bf16, adapters of rank 16 on all seven projections, on one H200: least squares of the relative error over
# the rows of benchmarks/results/h200-step.json up to a batch of 64 (largest error 2.9 %; beyond, a row costs more).
# Prompts: 2 x 6.74e9 products a token at 750 TFLOP/s, the rate of large products; no measured step carries prompts.
H200_7B = StepTime(
    base_s=4.321e-3, row_s=24.37e-6, lora_s=0.688e-3, adapter_s=21.01e-6, prompt_token_s=2 * 6.74e9 / 750e12
)


class Totals(msgspec.Struct, frozen=True):
    """What a worker has done since it started; sums over its steps (see `medley.spec.wire.EngineStats`)."""

    steps: float = 0.0
    step_s: float = 0.0
    rows: float = 0.0
    adapters: float = 0.0
    prompt_tokens: float = 0.0

    @classmethod
    def of(cls, stats: dict[str, Any]) -> Totals:
        """From a worker's row; what is absent counts as nothing."""
        return cls(*(float(stats.get(name) or 0.0) for name in cls.__struct_fields__))

    def since(self, before: Totals) -> Totals:
        return Totals(*(getattr(self, name) - getattr(before, name) for name in self.__struct_fields__))


def fit(samples: NDArray[np.float64], seconds: NDArray[np.float64]) -> StepTime:
    """Least squares of the relative error over [n, 4] (rows, any adapter, adapters, prompt tokens) and [n] seconds."""
    terms = np.column_stack([np.ones(len(samples)), samples]) / seconds[:, None]
    return _solve(terms.T @ terms, terms.T @ np.ones(len(samples)))


def _solve(products: NDArray[np.float64], against: NDArray[np.float64]) -> StepTime:
    """The solution without negative terms: the most negative goes, until none is left."""
    scale = np.sqrt(np.maximum(np.diag(products), 1e-30))
    kept = [i for i in range(NUM_TERMS) if products[i, i] > 0]
    found = np.zeros(NUM_TERMS)
    while kept:
        block = products[np.ix_(kept, kept)] / np.outer(scale[kept], scale[kept])
        answer = np.linalg.solve(block + RIDGE * np.eye(len(kept)), against[kept] / scale[kept])
        lowest = int(np.argmin(answer))
        if answer[lowest] >= 0:
            found[kept] = answer / scale[kept]
            break
        del kept[lowest]
    return StepTime(*(float(value) for value in found))


@dataclass
class StepTimeFit:
    """Fits while reports come in. Old ones fade, and outliers (a stalled disk, a noisy neighbour) count little."""

    _products: NDArray[np.float64] = field(default_factory=lambda: np.zeros((NUM_TERMS, NUM_TERMS)))
    _against: NDArray[np.float64] = field(default_factory=lambda: np.zeros(NUM_TERMS))
    _num_reports: int = 0
    _usual_error: float = 0.0
    _model: StepTime | None = None
    _is_stale: bool = False

    @property
    def model(self) -> StepTime | None:
        """The present fit; None before there are reports enough."""
        if self._num_reports < MIN_REPORTS:
            return None
        if self._is_stale or self._model is None:
            self._model = _solve(self._products, self._against)
            self._is_stale = False
        return self._model

    def add(self, done: Totals) -> None:
        """Takes in what one worker did between two of its reports; one without whole steps says nothing."""
        if done.steps < 1 or done.step_s <= 0 or done.rows < done.steps:
            return
        rows, adapters, prompt_tokens = (n / done.steps for n in (done.rows, done.adapters, done.prompt_tokens))
        seconds = done.step_s / done.steps
        weight = self._weight(rows, adapters, prompt_tokens, seconds)
        terms = np.array([1.0, rows, min(1.0, adapters), adapters, prompt_tokens]) / seconds
        fade = 1.0 - 1.0 / MEMORY
        self._products = fade * self._products + weight * np.outer(terms, terms)
        self._against = fade * self._against + weight * terms
        self._num_reports += 1
        self._is_stale = True

    def _weight(self, rows: float, adapters: float, prompt_tokens: float, seconds: float) -> float:
        model = self.model
        if model is None:
            return 1.0
        error = abs(model.step_s(rows, adapters, prompt_tokens) / seconds - 1.0)
        bound = HUBER * self._usual_error
        # The usual error follows slowly, and an outlier moves it no further than the bound.
        pace = 1.0 / min(self._num_reports, 50)
        self._usual_error += pace * (min(error, max(bound, 0.02)) - self._usual_error)
        return 1.0 if error <= max(bound, 1e-3) else max(bound, 1e-3) / error
