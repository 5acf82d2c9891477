from __future__ import annotations

import random
from uuid import UUID, uuid4

import pytest

from medley.spec.wire import JobKey
from medley_worker.shell.isolation import MAX_IDLE_DEATHS, Deaths, Suspect, limit_after_death, next_round

ALONE_LIMIT = 3  # of medley.db.crashes


def suspects(num: int, limit: int, revision: UUID | None = None) -> list[Suspect]:
    return [Suspect(JobKey(uuid4(), 1), revision, limit) for _ in range(num)]


def test_a_round_is_as_large_as_the_tightest_limit_in_it() -> None:
    tight, wide = suspects(3, 2), suspects(5, 8)
    chosen = next_round(wide + tight)
    assert len(chosen) == 2
    assert set(chosen) <= {s.key for s in tight}
    assert len(next_round(wide)) == 5
    assert next_round([]) == []


def test_jobs_of_one_adapter_share_a_round() -> None:
    mixed = [s for revision in (uuid4(), uuid4(), None) for s in suspects(4, 4, revision)]
    random.Random(1).shuffle(mixed)
    by_key = {s.key: s.revision for s in mixed}
    assert len({by_key[key] for key in next_round(mixed)}) == 1


@pytest.mark.parametrize(("num_jobs", "num_guilty"), [(1, 1), (8, 1), (64, 1), (64, 3), (37, 2), (5, 0)])
def test_rounds_find_every_culprit_run_every_other_and_end(num_jobs: int, num_guilty: int) -> None:
    jobs = suspects(num_jobs, limit_after_death(num_jobs))
    guilty = {s.key for s in random.Random(num_jobs).sample(jobs, num_guilty)}
    waiting = {s.key: s for s in jobs}
    deaths_alone = dict.fromkeys(guilty, 0)
    quarantined, num_deaths = set(), 0
    while waiting:
        entering = next_round(waiting.values())
        assert len(entering) <= min(waiting[key].step_limit for key in entering)
        if guilty.isdisjoint(entering):
            for key in entering:
                del waiting[key]
            continue
        num_deaths += 1
        for key in entering:
            waiting[key] = Suspect(key, None, limit_after_death(len(entering)))
        if len(entering) == 1:
            deaths_alone[entering[0]] += 1
            if deaths_alone[entering[0]] == ALONE_LIMIT:
                quarantined.add(entering[0])
                del waiting[entering[0]]
    assert quarantined == guilty
    assert num_deaths <= num_guilty * (num_jobs.bit_length() + ALONE_LIMIT)


def test_engines_that_die_idle_are_started_slower_and_then_not_at_all() -> None:
    deaths = Deaths()
    waits = [deaths.died(0) for _ in range(MAX_IDLE_DEATHS)]
    assert waits == [0.5, 1.0, None]


def test_a_death_with_suspects_or_work_done_starts_the_count_again() -> None:
    deaths = Deaths()
    deaths.died(0)
    deaths.died(0)
    assert deaths.died(4) == 0.0
    assert deaths.died(0) == 0.5
    deaths.worked()
    assert deaths.died(0) == 0.5
