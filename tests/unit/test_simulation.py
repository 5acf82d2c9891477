"""The simulator: virtual workers against sums by hand, the oracle against counting, and what the policy is to reach."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from uuid import UUID

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from medley.cli.simulate import simulate as command
from medley.dispatcher.plans import Phase
from medley.dispatcher.simulation import trace_files
from medley.dispatcher.simulation.oracle import oracle
from medley.dispatcher.simulation.report import simulate
from medley.dispatcher.simulation.run import Simulation
from medley.dispatcher.simulation.traces import BASE, TRACES, Mix, Trace, bulk, day
from medley.dispatcher.simulation.workers import Job, Shape, VirtualWorker
from medley.dispatcher.step_time import H200_7B, StepTime

PLAIN = StepTime(base_s=0.010, row_s=0.001, lora_s=0.0, adapter_s=0.0, prompt_token_s=0.0001)
SHAPE = Shape(step_time=H200_7B)


def job(number: int, *, prompt: int = 100, steps: int = 50, adapter: int | None = None) -> Job:
    lane = UUID(int=1 if adapter is None else 100 + adapter)
    return Job(number, lane, UUID(int=1), adapter is not None, 1, 0.0, prompt, steps, prompt + 2 * steps)


def worker(**shape: float) -> VirtualWorker:
    made = VirtualWorker(UUID(int=9), 0, Shape(step_time=PLAIN, **shape), Counter())  # type: ignore[arg-type]
    made.phase = Phase.ACTIVE
    return made


def arrivals(*times: float, steps: int = 1_000) -> Trace:
    num = len(times)
    one, none = np.ones(num, np.int64), np.full(num, BASE)
    return Trace("few", np.array(times), 0 * one, none, one, steps * one, steps * one, one)


def test_a_job_alone_takes_its_prompt_and_its_steps() -> None:
    alone = worker()
    alone.deliver([job(0)])
    assert alone.next_end_s() == pytest.approx(100 * 0.0001 + 50 * 0.011)


def test_rows_slow_each_other_and_a_prompt_delays_all() -> None:
    both = worker()
    both.deliver([job(0)])
    both.advance(0.010 + 10 * 0.011)  # the prompt, and ten steps
    both.deliver([job(1, steps=5)])
    assert both.next_end_s() - 0.12 == pytest.approx(0.010 + 5 * 0.012)
    both.advance(both.next_end_s())
    assert [ended.number for ended in both.end_due()[0]] == [1]
    assert both.next_end_s() - 0.19 == pytest.approx(35 * 0.011)
    assert both.totals.steps == pytest.approx(15)
    assert both.totals.rows == pytest.approx(20)


def test_what_is_given_back_keeps_its_steps_and_ends_elsewhere() -> None:
    first, second = worker(), worker()
    first.deliver([job(0)])
    first.advance(0.010 + 20 * 0.011)
    (moved,) = first.give_back()
    assert (moved.num_done, moved.steps, first.num_leased) == (20, 30, 0)
    second.deliver([moved])
    assert second.next_end_s() == pytest.approx((100 + 20) * 0.0001 + 30 * 0.011)


def test_adapters_that_nobody_needs_leave_first_and_one_in_use_never() -> None:
    small = worker(adapter_slots=2, max_num_seqs=4, load_s=0.0)
    assert small.deliver([job(0, adapter=1, steps=10), job(1, adapter=2, steps=20)]) == []
    assert small.deliver([job(2, adapter=3)]) == []
    assert small.num_rows == 2
    small.advance(small.next_end_s())
    ended, evicted = small.end_due()
    assert [j.number for j in ended] == [0]
    assert evicted == [UUID(int=101)]
    assert small.num_rows == 2


def test_the_oracle_has_the_workers_that_rows_need_and_no_more() -> None:
    shape = Shape(step_time=PLAIN, max_num_seqs=2)
    # One row steps in 11 ms, two in 12: a thousand steps are 11 or 12 s and a bit.
    assert oracle(arrivals(0.0), shape).tolist() == [1] * 12
    assert oracle(arrivals(0.0, 0.0, 0.0), shape).tolist()[:10] == [2] * 10
    assert oracle(arrivals(0.0, 30.0), shape).tolist()[12:30] == [0] * 18


def test_the_oracle_puts_rows_of_an_adapter_side_by_side() -> None:
    slow = msgspec.structs.replace(PLAIN, adapter_s=0.010)
    shape = Shape(step_time=slow, max_num_seqs=4)
    mixed = arrivals(*[0.0] * 8)
    apart = Trace(**{**vars(mixed), "adapter": np.array([0, 1] * 4)})
    alike = Trace(**{**vars(mixed), "adapter": np.array([0] * 4 + [1] * 4)})
    assert oracle(apart, shape).tolist() == oracle(alike, shape).tolist()


def test_every_job_ends_once_wherever_it_was_moved() -> None:
    trace = day(3, 240.0, 60.0, Mix(num_adapters=40))
    course = Simulation(trace, Shape(step_time=H200_7B, max_num_seqs=32, adapter_slots=16), 20).run()
    assert not any(math.isnan(ended_s) for ended_s in course.ended_s)
    assert all(ended_s > j.started_s >= j.arrived_s for ended_s, j in zip(course.ended_s, course.jobs, strict=True))
    done = [j.num_done + j.steps for j in course.jobs]
    assert np.array_equal(done, trace.output_tokens)
    assert course.num_drains > 0


def test_a_seed_gives_one_result() -> None:
    trace = TRACES["ramp"](5, 60.0, 40.0, Mix())
    assert simulate(trace, SHAPE, 8) == simulate(TRACES["ramp"](5, 60.0, 40.0, Mix()), SHAPE, 8)
    assert len(TRACES["ramp"](6, 60.0, 40.0, Mix())) != len(trace)


def test_a_day_takes_at_most_a_tenth_more_than_the_oracle_and_nobody_waits_long() -> None:
    report, _ = simulate(day(1, 900.0, 120.0, Mix()), SHAPE, 32, turn_s=0.25)
    assert report.ratio <= 1.10
    assert report.wait.p95_s < 2.0
    assert report.wakes_with_room == 0


def test_light_tenants_do_not_wait_behind_a_batch_of_a_hundred_thousand() -> None:
    report, _ = simulate(bulk(1, 90.0, 60.0, Mix(output_tokens=60), num_jobs=100_000), SHAPE, 4, turn_s=0.25)
    assert report.wait_by_size["light"].p95_s < 2.0
    assert report.wait_by_size["heavy"].p50_s > 20.0
    assert report.wakes_with_room == 0


def test_tenants_that_all_wait_share_by_weight() -> None:
    trace = TRACES["contention"](2, 500.0, 40.0, Mix(num_tenants=4, num_adapters=40))
    report, _ = simulate(trace, SHAPE, 4, weights={0: 2.0}, turn_s=0.25)
    assert report.fairness.windows >= 3
    assert report.fairness.overall is not None
    assert report.fairness.overall < 1.25


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    trace = day(1, 30.0, 20.0, Mix())
    trace_files.write(trace, tmp_path / "day.jsonl")
    again = trace_files.read(tmp_path / "day.jsonl")
    assert again.name == "day"
    assert np.allclose(again.arrived_s, trace.arrived_s, atol=1e-6)
    for field in ("prompt_tokens", "output_tokens", "max_tokens", "priority"):
        assert np.array_equal(getattr(again, field), getattr(trace, field))
    assert len(np.unique(again.adapter)) == len(np.unique(trace.adapter))
    assert np.array_equal(again.adapter == BASE, trace.adapter == BASE)


def test_a_file_that_is_no_trace_is_refused_with_all_its_faults(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = {"at_s": 0, "tenant": "a", "prompt_tokens": 5, "output_tokens": 5}
    lines = [good, good | {"at_s": -1, "output_tokens": 0}, good | {"max_tokens": 4}, good | {"model": "x"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(trace_files.TraceRefused) as refused:
        trace_files.read(path)
    assert [fault.split(":")[0] for fault in refused.value.faults] == ["line 2", "line 2", "line 3", "line 4"]
    answer = CliRunner().invoke(command, [str(path)])
    assert answer.exit_code == 1
    assert "line 3: max_tokens: got 4, wanted at least output_tokens (5)" in answer.output


def test_the_command_reports_as_text_and_as_json(tmp_path: Path) -> None:
    size = ["ramp", "--duration-s", "30", "--peak", "10", "--workers", "4"]
    saved = tmp_path / "ramp.jsonl"
    shown = CliRunner().invoke(command, [*size, "--save-trace", str(saved)])
    assert shown.exit_code == 0, shown.output
    assert "GPU-seconds" in shown.output
    told = CliRunner().invoke(command, [str(saved), "--workers", "4", "--json", "--weight", "0=2"])
    report = json.loads(told.output)
    assert report["trace"] == "ramp"
    assert report["jobs"] == len(saved.read_text().splitlines())
    assert CliRunner().invoke(command, ["nowhere"]).exit_code == 2
    assert CliRunner().invoke(command, [*size, "--weight", "0=-1"]).exit_code == 2
