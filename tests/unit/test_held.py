from __future__ import annotations

import random
from uuid import UUID, uuid4

from medley.spec.sampling import SamplingParams
from medley.spec.wire import AdapterRef, Batch, JobKey, WorkItem
from medley_worker.shell.held import Held, HeldJobs, Phase, Share

TENANT = uuid4()


def job(*, step_limit: int | None = None, revision: UUID | None = None) -> Held:
    key = JobKey(uuid4(), 1)
    adapter = None if revision is None else AdapterRef(TENANT, revision, "/nowhere")
    return Held(key, WorkItem(key, (1, 2), adapter, SamplingParams()), step_limit, tenant=TENANT)


def entered(table: HeldJobs) -> list[JobKey]:
    return [item.key for item in table.enter()[0]]


def test_a_job_is_held_once() -> None:
    table, one = HeldJobs(), job()
    assert table.hold([one]) == [one]
    assert table.hold([job(), Held(JobKey(one.key.job, 2))]) != []
    assert len(table) == 2
    assert table.not_held([one.key.job]) == []
    table.check_integrity()


def test_jobs_enter_at_once_and_suspects_wait_for_an_empty_engine() -> None:
    table, normal, suspect = HeldJobs(), [job(), job()], [job(step_limit=1), job(step_limit=1)]
    table.hold(normal)
    assert entered(table) == [held.key for held in normal]
    table.hold(suspect)
    later = job()
    table.hold([later])
    assert entered(table) == [], "normal work drains first"
    table.leave([held.key for held in normal])
    (first,) = entered(table)
    assert entered(table) == [], "nothing shares the engine with a round"
    table.leave([first])
    (second,) = entered(table)
    assert {first, second} == {held.key for held in suspect}
    table.leave([second])
    assert entered(table) == [later.key]
    table.check_integrity()


def test_the_adapters_of_what_waits_behind_a_round_are_told_in_order() -> None:
    table, revisions = HeldJobs(), [uuid4(), uuid4()]
    table.hold([job(step_limit=4)])
    table.hold([job(revision=revision) for revision in (*revisions, revisions[0])] + [job()])
    items, later = table.enter()
    assert len(items) == 1
    assert [adapter.revision for adapter in later] == revisions


def test_after_a_death_what_was_running_is_suspect_and_the_rest_only_waits() -> None:
    table, jobs = HeldJobs(), [job() for _ in range(6)]
    table.hold(jobs)
    table.enter()
    table.announce([held.key for held in jobs[:4]])
    table.leave([jobs[0].key])
    suspects = table.put_back(is_death=True)
    assert suspects == [held.key for held in jobs[1:4]]
    assert [held.step_limit for held in jobs[1:]] == [2, 2, 2, None, None]
    table.check_integrity()
    assert len(entered(table)) == 2


def test_an_engine_that_was_stopped_leaves_no_suspects() -> None:
    table, one = HeldJobs(), job()
    table.hold([one])
    table.enter()
    table.announce([one.key])
    assert table.put_back(is_death=False) == []
    assert entered(table) == [one.key]


def test_what_the_engine_says_of_another_attempt_is_ignored() -> None:
    table, one = HeldJobs(), job()
    table.hold([one])
    table.enter()
    stale = JobKey(one.key.job, 2)
    table.announce([stale])
    assert table.leave([stale, one.key, one.key]) == [None, one, None]
    assert not one.is_running


def test_an_end_says_where_the_job_stood_and_counts_once() -> None:
    table, waiting, running, unknown = HeldJobs(), job(step_limit=1), job(), JobKey(uuid4(), 1)
    table.hold([running])
    table.enter()
    table.hold([waiting])
    assert [table.end(key) for key in (waiting.key, running.key, unknown)] == [
        Phase.WAITING,
        Phase.IN_ENGINE,
        Phase.WAITING,
    ]
    assert [table.end(key) for key in (waiting.key, running.key, unknown)] == [None] * 3
    assert table.hold([Held(unknown)]) == [], "a job that ends is not taken in again"
    table.check_integrity()
    table.drop([waiting.key, running.key, unknown])
    assert table.wait_empty(0)


def test_a_release_is_asked_of_the_engine_once() -> None:
    table, one = HeldJobs(), job()
    table.hold([one])
    table.enter()
    assert [table.ask_release(one.key) for _ in range(2)] == [Phase.IN_ENGINE, None]
    assert table.leave([one.key]) == [one]
    assert table.ask_release(one.key) is None


def test_any_order_of_events_keeps_the_table_whole() -> None:
    for seed in range(30):
        rng, table, known = random.Random(seed), HeldJobs(), list[JobKey]()
        for _ in range(200):
            some = rng.sample(known, min(len(known), 3))
            match rng.randrange(8):
                case 0 | 1:
                    new = [job(step_limit=rng.choice([None, None, 1, 4])) for _ in range(rng.randrange(5))]
                    known += [held.key for held in table.hold(new)]
                case 2 | 3:
                    known_to_engine = [item.key for item in table.enter()[0]]
                    table.announce(known_to_engine[:2])
                case 4:
                    table.leave(some)
                case 5:
                    table.put_back(is_death=rng.random() < 0.5)
                case 6:
                    ended = [key for key in some if table.end(key) is not None]
                    table.drop(ended)
                    known = [key for key in known if key not in ended]
                case _:
                    table.ask_release(some[0]) if some else table.end_waiting(lambda held: held.step_limit == 4)
            table.check_integrity()


def test_a_batch_is_told_by_tenant_and_adapter_without_what_has_ended() -> None:
    table, revision = HeldJobs(), uuid4()
    jobs = [job(revision=revision), job(revision=revision), job(), job(), job()]
    table.hold(jobs)
    entered(table)
    table.hold([job(revision=revision), Held(JobKey(uuid4(), 1), phase=Phase.ENDING)])
    batch = Batch(decoding=(jobs[0].key, jobs[2].key), prefilling=(jobs[1].key, JobKey(uuid4(), 1)))
    table.leave([jobs[4].key])
    assert table.composition(batch) == [Share(TENANT, revision, 1, 1, 1), Share(TENANT, None, 1, 0, 1)]
