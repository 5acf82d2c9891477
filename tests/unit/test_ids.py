"""Ids are unique, grow with time, and are read back only when they are of the kind that was asked for."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from uuid import RFC_4122, UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medley.spec.ids import ADAPTER, BATCH, JOB, REVISION, SWEEP, WORKER, parse_id, public_id, uuid7


def test_an_id_is_a_version_7_uuid_of_this_moment() -> None:
    before, value, after = time.time_ns() // 1_000_000, uuid7(), time.time_ns() // 1_000_000
    assert value.version == 7
    assert value.variant == RFC_4122
    # A burst may run a little ahead of the clock: ids grow strictly, 4096 to a millisecond.
    assert before <= value.int >> 80 <= after + 1000


def test_ids_grow_strictly_in_one_thread_and_are_unique_in_many() -> None:
    ids = [uuid7() for _ in range(20_000)]
    assert ids == sorted(set(ids))
    with ThreadPoolExecutor(8) as pool:
        many = [value for values in pool.map(lambda _: [uuid7() for _ in range(2_000)], range(8)) for value in values]
    assert len(set(many)) == len(many)
    assert min(many) > ids[-1]


def test_ids_grow_when_the_clock_steps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = uuid7()
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    assert first < uuid7() < uuid7()


@settings(deadline=None)
@given(st.sampled_from([JOB, BATCH, SWEEP, ADAPTER, REVISION, WORKER]), st.uuids())
def test_a_public_id_is_read_back_by_its_own_kind_alone(prefix: str, value: UUID) -> None:
    text = public_id(prefix, value)
    assert text == f"{prefix}_{value.hex}"
    assert parse_id(prefix, text) == value
    for other in {JOB, BATCH, SWEEP, ADAPTER, REVISION, WORKER} - {prefix}:
        assert parse_id(other, text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "job",
        "job_",
        "_" + "0" * 32,
        "job_" + "0" * 31,
        "job_" + "0" * 33,
        "job_" + "g" * 32,
        "job-" + "0" * 32,
        "job_" + "0" * 31 + "\n",
        "job_" + "0x" + "0" * 30,
        "job_" + "0" * 15 + "_" + "0" * 16,
        "job_" + " " + "0" * 31,
        "job_" + "+" + "0" * 31,
        "job_" + "٣" * 32,
        "job_" + "A" * 32,
        "job_urn:uuid:" + "0" * 23,
        "JOB_" + "0" * 32,
    ],
)
def test_what_is_not_exactly_an_id_is_none(text: str) -> None:
    assert parse_id(JOB, text) is None
