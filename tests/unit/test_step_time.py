"""The step-time model: its constants are the measured file's, its fit finds what made the reports."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from plain_plans import uid

from medley.dispatcher.pace import Pace
from medley.dispatcher.step_time import H200_7B, StepTime, StepTimeFit, Totals, fit

MEASURED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "h200-step.json"


def report(
    model: StepTime, rows: float, adapters: float, prompts: float, *, steps: int = 400, by: float = 1.0
) -> Totals:
    steps = 400
    seconds = steps * model.step_s(rows, adapters, prompts) * by
    return Totals(steps, seconds, steps * rows, steps * adapters, steps * prompts)


def test_the_constants_are_those_of_the_measured_steps_up_to_64_rows_within_three_percent() -> None:
    rows = [row for row in json.loads(MEASURED.read_text())["rows"] if row["model"] == "7b" and row["batch"] <= 64]
    samples = np.array([[r["batch"], min(1, r["adapters"]), r["adapters"], 0.0] for r in rows])
    seconds = np.array([r["ms"] / 1e3 for r in rows])
    found = fit(samples, seconds)
    for name in ("base_s", "row_s", "lora_s", "adapter_s"):
        assert getattr(H200_7B, name) == pytest.approx(getattr(found, name), rel=0.01)
    for row, measured_s in zip(rows, seconds, strict=True):
        assert H200_7B.step_s(row["batch"], row["adapters"]) == pytest.approx(measured_s, rel=0.03)


def test_a_fit_from_reports_finds_the_model_that_made_them() -> None:
    draw, found = random.Random(3), StepTimeFit()
    for _ in range(300):
        rows = draw.uniform(1, 64)
        found.add(report(H200_7B, rows, draw.uniform(0, rows), draw.uniform(0, 200), by=draw.uniform(0.98, 1.02)))
    assert found.model is not None
    for rows, adapters, prompts in ((1, 0, 0), (32, 32, 50), (64, 8, 150), (64, 64, 0)):
        assert found.model.step_s(rows, adapters, prompts) == pytest.approx(
            H200_7B.step_s(rows, adapters, prompts), rel=0.03
        )


def test_reports_of_stalled_workers_hardly_move_a_fit() -> None:
    draw, found = random.Random(4), StepTimeFit()
    for number in range(400):
        rows = draw.uniform(1, 64)
        slowed = 20.0 if number > 50 and number % 20 == 0 else 1.0
        found.add(report(H200_7B, rows, rows / 2, 50, by=slowed * draw.uniform(0.98, 1.02)))
    assert found.model is not None
    assert found.model.step_s(32, 16, 50) == pytest.approx(H200_7B.step_s(32, 16, 50), rel=0.06)


def test_a_fit_of_one_kind_of_step_knows_that_kind_and_has_no_negative_terms() -> None:
    found = StepTimeFit()
    for _ in range(20):
        found.add(report(H200_7B, 64, 12, 80))
    assert found.model is not None
    assert found.model.step_s(64, 12, 80) == pytest.approx(H200_7B.step_s(64, 12, 80), rel=0.01)
    assert min(getattr(found.model, name) for name in StepTime.__struct_fields__) >= 0


def test_there_is_no_model_before_reports_enough_and_empty_ones_say_nothing() -> None:
    found = StepTimeFit()
    for _ in range(10):
        found.add(Totals())
    assert found.model is None


def test_what_a_full_worker_finishes_follows_from_what_jobs_took() -> None:
    draw, pace, done, num_jobs = random.Random(5), Pace(), Totals(), 0
    for _ in range(40):
        pace.see(uid(1), done, num_jobs)
        # Jobs of 200 steps and 50 prompt tokens; one adapter for four rows.
        rows = draw.choice([8, 16, 24, 40, 48])
        more = report(H200_7B, rows, rows / 4, rows / 4)
        num_jobs += 2 * rows
        done = Totals(*(getattr(done, n) + getattr(more, n) for n in Totals.__struct_fields__))
    assert pace.jobs_per_s(64) == pytest.approx(H200_7B.jobs_per_s(64, 16, 200, 50), rel=0.05)
