"""Forecasts against a fluid that is poured step by step, and which deadlines are helped."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_plans import HIGH, LOW, NORMAL, uid

from medley.dispatcher.forecasts import OpenBatch, forecast, judge


def batch(
    number: int,
    num_left: int,
    *,
    tenant: int = 1,
    weight: float = 1.0,
    priority: int = NORMAL,
    due_s: float | None = None,
) -> OpenBatch:
    return OpenBatch(uid(number), uid(tenant), weight, priority, num_left, due_s)


def ends(batches: list[OpenBatch], jobs_per_s: float) -> dict[int, float]:
    return {f.batch.int: f.ends_in_s for f in forecast(batches, jobs_per_s)}


def poured(batches: list[OpenBatch], jobs_per_s: float, step_s: float) -> dict[int, float]:
    """When each batch is done, by giving every waiting tenant of the highest class its share again and again."""
    left, found, now = {b.id: float(b.num_left) for b in batches}, {}, 0.0
    while left:
        now += step_s
        top = max(b.priority for b in batches if b.id in left)
        first: dict[object, OpenBatch] = {}
        for b in sorted((b for b in batches if b.id in left and b.priority == top), key=lambda b: b.id):
            first.setdefault(b.tenant, b)
        total = sum(b.weight for b in first.values())
        for b in first.values():
            left[b.id] -= jobs_per_s * step_s * b.weight / total
            if left[b.id] <= 0:
                del left[b.id]
                found[b.id.int] = now
    return found


def test_batches_of_one_tenant_end_one_after_another() -> None:
    assert ends([batch(1, 30), batch(2, 10)], 2.0) == {1: 15, 2: 20}


def test_tenants_share_by_weight_and_a_higher_class_comes_first() -> None:
    sharing = [batch(1, 30, tenant=1, weight=3), batch(2, 30, tenant=2)]
    assert ends(sharing, 1.0) == {1: 40, 2: 60}
    assert ends([*sharing, batch(3, 10, tenant=3, priority=HIGH), batch(4, 6, priority=LOW)], 1.0) == {
        1: 50,
        2: 70,
        3: 10,
        4: 76,
    }


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_forecast_is_what_pouring_the_fluid_gives(seed: int) -> None:
    draw = random.Random(seed)
    weights = {t: draw.choice([0.5, 1.0, 2.0]) for t in range(4)}
    batches = []
    for number in range(8):
        tenant = draw.randrange(4)
        batches.append(
            batch(
                number,
                draw.randrange(5, 60),
                tenant=tenant,
                weight=weights[tenant],
                priority=draw.choice([NORMAL, NORMAL, HIGH]),
            )
        )
    slowly = poured(batches, 10.0, 0.005)
    for number, ends_in_s in ends(batches, 10.0).items():
        assert ends_in_s == pytest.approx(slowly[number], abs=0.2)


def test_a_forecast_past_the_deadline_is_late_and_none_is_made_without_a_rate() -> None:
    assert [f.is_late for f in forecast([batch(1, 10, due_s=9.0), batch(2, 1, due_s=30.0)], 1.0)] == [True, False]
    assert forecast([batch(1, 10)], 0.0) == []


def test_a_deadline_is_helped_when_it_needs_all_of_its_time_and_not_before() -> None:
    assert judge([batch(1, 100, due_s=1_000)], 1.0, HIGH).hasten == []
    assert judge([batch(1, 100, due_s=140)], 1.0, HIGH).hasten == [uid(1)]
    assert judge([batch(1, 100, due_s=140, priority=HIGH)], 1.0, HIGH).hasten == []


def test_earlier_deadlines_take_time_of_later_ones() -> None:
    dues = [batch(1, 100, due_s=385), batch(2, 200, due_s=380, tenant=2)]
    verdict = judge(dues, 1.0, HIGH)
    assert verdict.hasten == [uid(1)]
    assert verdict.hopeless == []


def test_a_hopeless_deadline_takes_nobodys_time() -> None:
    dues = [batch(1, 1_000, due_s=100), batch(2, 80, due_s=110, tenant=2)]
    verdict = judge(dues, 1.0, HIGH)
    assert verdict.hopeless == [uid(1)]
    assert verdict.hasten == [uid(2)]


def test_without_a_rate_only_near_deadlines_are_helped() -> None:
    verdict = judge([batch(1, 1_000, due_s=50), batch(2, 1, due_s=70)], 0.0, HIGH)
    assert (verdict.hasten, verdict.hopeless) == ([uid(1)], [])


def test_a_rate_of_next_to_nothing_forecasts_nothing() -> None:
    """A time that no calendar has could not be stored and read."""
    batch = OpenBatch(uid(1), uid(2), 1.0, 1, 100)
    assert forecast([batch], 1e-12) == []
