"""The fleet benchmark's arithmetic: its load over time, its jobs, and what it makes of what it saw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest
from benchmarks.fleet_load import Ledger, Lengths, Source, Tenant
from benchmarks.fleet_phases import run_phases
from benchmarks.fleet_shapes import SETTINGS, lines, rates
from benchmarks.fleet_watch import Seen, Watch

LENGTHS = Lengths(prompt=(4, 8), new=(10, 20), long=(100, 100), long_share=0.25)


def source(name: str = "acme", seed: int = 7) -> Source:
    return Source(Tenant(name, cast(Any, None), ("a", "b")), LENGTHS, seed)


def test_the_load_is_low_then_more_than_one_worker_serves_then_low() -> None:
    for num_workers, is_shared in ((2, False), (4, False), (2, True)):
        rate = rates(SETTINGS["7b"], num_workers, is_shared=is_shared)
        assert rate(0) == rate(0.1) == rate(0.8) == rate(1.5) == 0.45
        assert rate(0.4) > 1
        assert 0.45 < rate(0.25) < rate(0.4)
    assert rates(SETTINGS["7b"], 2, is_shared=False)(0.4) < 2, "what all of them serve is enough"


def test_one_worker_has_nothing_to_do_for_a_while() -> None:
    rate = rates(SETTINGS["7b"], 1, is_shared=False)
    assert max(rate(share / 100) for share in range(101)) < 1
    assert rate(0.6) == rate(0.8) == 0 < rate(0.9)


def test_the_load_is_planned_by_what_a_worker_serves_of_the_jobs_that_arrive() -> None:
    setting, planned = SETTINGS["7b"], []

    def rise_and_fall(jobs_s: float, seconds: float, is_shared: bool) -> dict[str, Any]:
        planned.append((jobs_s, seconds, is_shared))
        return {"gpus_awake": [(0.0, 1)], "wakes_s": []}

    bench = SimpleNamespace(
        setting=setting,
        num_workers=1,
        watch=SimpleNamespace(workers={"only": None}, steer=lambda *_: None),
        saturate=lambda *_: {"tok_s": 1_000.0},
        rise_and_fall=rise_and_fall,
    )
    figures: dict[str, Any] = {}
    run_phases(cast(Any, bench), figures, [], 150.0, 20.0, is_shared=False)
    served = 1_000 * setting.arriving_share
    assert served < 1_000
    assert planned == [(pytest.approx(served / setting.lengths.mean_new), 150.0, False)]
    assert (figures["one_gpu_tok_s"], figures["one_gpu_arriving_tok_s"]) == (1_000, pytest.approx(served))


def test_lines_go_through_their_points() -> None:
    at = lines([(0.0, 1.0), (0.5, 3.0), (1.0, 2.0)])
    assert [at(0.0), at(0.25), at(0.5), at(0.75), at(1.0), at(2.0)] == [1.0, 2.0, 3.0, 2.5, 2.0, 2.0]


def test_jobs_follow_from_the_seed_and_have_the_lengths_that_were_asked_for() -> None:
    jobs = source().jobs(400)
    assert jobs == source().jobs(400)
    assert jobs != source(seed=8).jobs(400) != source("globex").jobs(400)
    new = [int(str(job["max_tokens"])) for job in jobs]
    assert all(10 <= tokens <= 20 or tokens == 100 for tokens in new)
    assert sum(new) / len(new) == pytest.approx(LENGTHS.mean_new, rel=0.25)
    assert {job["adapter"] for job in jobs} == {"a", "b"}


def test_arrivals_come_at_the_rate_on_the_average() -> None:
    draws = source()
    assert sum(draws.num_arrived(1.5) for _ in range(1_000)) == pytest.approx(1_500, rel=0.1)
    assert draws.num_arrived(0.0) == 0


def test_every_setting_has_lengths_that_its_model_takes() -> None:
    longest = {"demo": 256, "tiny": 4096, "7b": 4096}
    for name, setting in SETTINGS.items():
        for lengths in (setting.lengths, setting.steady):
            assert lengths.prompt[1] + max(lengths.new[1], lengths.long[1]) <= longest[name]


def test_tokens_a_second_are_of_the_results_within_the_time() -> None:
    ledger = Ledger(results=[(1.0, 10), (2.0, 20), (3.9, 30), (4.0, 40)])
    assert ledger.tokens_per_s(2.0, 4.0) == 25.0


def test_rows_and_tokens_are_counted_between_reports() -> None:
    seen = Seen(totals=[(10.0, 0, 0, 0), (12.0, 10, 40, 30), (14.0, 30, 200, 190)])
    assert seen.rows_per_step(12.5, 14.5) == 8.0
    assert seen.tokens(10.0, 14.0) == 190
    assert seen.rows_per_step(14.5, 20.0) == 0.0, "it took no step"
    assert seen.tokens(0.0, 5.0) == 0, "nothing was known yet"


def test_who_is_awake_is_said_where_it_changes() -> None:
    watch = Watch(cast(Any, None), "")
    watch.workers[UUID(int=1)] = Seen(states=[(0.0, "asleep"), (5.0, "waking"), (6.0, "active")])
    watch.workers[UUID(int=2)] = Seen(states=[(0.0, "asleep"), (9.0, "active"), (12.0, "draining"), (13.0, "asleep")])
    assert watch.awake(5.5, 20.0) == [(5.5, 1), (9.0, 2), (13.0, 1)]
    assert watch.awake(0.0, 12.5) == [(0.0, 0), (5.0, 1), (9.0, 2)]
