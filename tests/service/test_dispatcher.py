"""The dispatcher on real rows and a real Redis: it claims, rings, takes back, wakes and serves tenants alike."""

from __future__ import annotations

import functools
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Connection, text
from staging import Stage
from timing import keeps_to, timed
from waiting import wait_until

from medley.db import batches, flags
from medley.db.connections import tenant_transaction
from medley.db.workers import WorkerState
from medley.rings import DONE_CHANNEL


def test_jobs_that_wait_for_what_is_shared_no_longer_are_failed(stage: Stage) -> None:
    ledger = stage.ledger
    owner, friend = ledger.add_tenant(), ledger.add_tenant()
    revision = ledger.add_revision(owner, "a")
    batch, own = ledger.submit(friend, [revision, revision, None]), ledger.submit(owner, [revision])
    stage.tick(stage.dispatcher())
    ended = [row.state for row in ledger.jobs().values() if row.batch_id == batch]
    assert sorted(ended) == ["failed", "failed", "queued"]
    assert ledger.job_of(own).state == "queued"
    ledger.check()


def test_waiting_jobs_become_a_workers_rows_and_messages_of_at_most_256_ids(stage: Stage) -> None:
    tenant = stage.ledger.add_tenant()
    worker = stage.ledger.start_worker(max_num_seqs=200)
    stage.ledger.submit(tenant, [None] * 300)
    dispatcher = stage.dispatcher()
    dispatcher.tick()
    assert stage.states() == ["leased"] * 300
    wait_until(lambda: len(stage.messages(worker)) == 2)
    sent = [job for part in stage.messages(worker) for job in part]
    assert sorted(sent) == sorted(job.hex for job in stage.ledger.jobs())
    assert max(map(len, stage.messages(worker))) <= 256
    stage.ledger.check()


def test_a_claim_leaves_no_more_than_rows_and_backlog_with_a_worker(stage: Stage) -> None:
    tenant, worker = stage.ledger.add_tenant(), stage.ledger.start_worker(max_num_seqs=8)
    stage.ledger.submit(tenant, [None] * 40)
    dispatcher = stage.dispatcher()
    for _ in range(3):
        look_in_s = dispatcher.tick()
    assert stage.states().count("leased") == 16
    assert look_in_s <= 0.1
    held = [(row.id, row.attempt) for row in stage.ledger.jobs().values() if row.worker_id == worker]
    stage.ledger.complete(worker, held[:5])
    dispatcher.tick()
    assert stage.states().count("leased") == 16


def test_a_sleeping_worker_is_woken_rung_and_used_once_it_is_active(stage: Stage) -> None:
    tenant = stage.ledger.add_tenant()
    worker = stage.ledger.start_worker(WorkerState.ASLEEP)
    with stage.ledger.working() as conn:
        conn.execute(text("UPDATE workers SET desired_state = 'asleep' WHERE id = :id"), {"id": worker})
    dispatcher = stage.dispatcher()
    dispatcher.tick()
    assert stage.desired(worker) == "asleep"
    stage.ledger.submit(tenant, [None])
    dispatcher.tick()
    assert stage.desired(worker) == "active"
    assert stage.states() == ["queued"]
    wait_until(lambda: stage.messages(worker) == [[]])
    stage.ledger.renew(worker, WorkerState.ACTIVE)
    dispatcher.tick()
    assert stage.states() == ["leased"]


def test_an_idle_worker_is_sent_to_sleep(stage: Stage) -> None:
    worker = stage.ledger.start_worker()
    dispatcher = stage.dispatcher(idle_sleep_s=30)
    dispatcher.tick()
    stage.tick(dispatcher)
    assert stage.desired(worker) == "active"
    stage.tick(dispatcher)
    assert stage.desired(worker) == "asleep"


def test_jobs_of_a_dead_worker_go_to_a_living_one(stage: Stage) -> None:
    tenant = stage.ledger.add_tenant()
    dead = stage.ledger.start_worker()
    stage.ledger.submit(tenant, [None] * 5)
    dispatcher = stage.dispatcher()
    dispatcher.tick()
    living = stage.ledger.start_worker()
    stage.ledger.lapse(dead)
    stage.tick(dispatcher)
    rows = stage.ledger.jobs().values()
    assert {(row.state, row.worker_id, row.attempt) for row in rows} == {("leased", living, 2)}
    stage.ledger.check()


def test_one_claim_gives_many_workers_their_jobs_and_each_is_told_of_its_own(stage: Stage) -> None:
    tenants = [stage.ledger.add_tenant() for _ in range(3)]
    holders = [stage.ledger.start_worker(max_num_seqs=4) for _ in range(5)]
    for tenant in tenants:
        stage.ledger.submit(tenant, [None] * 20)
    stage.dispatcher().tick()
    jobs = stage.ledger.jobs()
    for worker in holders:
        own = sorted(row.id.hex for row in jobs.values() if row.worker_id == worker)
        assert len(own) == 8
        wait_until(lambda own=own, worker=worker: sorted(job for part in stage.messages(worker) for job in part) == own)
    with stage.ledger.working() as conn:
        statement = text("SELECT count(DISTINCT xmin::text) FROM jobs WHERE pool = :pool AND state = 'leased'")
        assert conn.execute(statement, {"pool": stage.ledger.pool}).scalar_one() == 1
    stage.ledger.check()


def test_a_job_that_was_given_back_is_the_first_of_its_lane_again(stage: Stage) -> None:
    tenant, worker = stage.ledger.add_tenant(), stage.ledger.start_worker(max_num_seqs=2)
    stage.ledger.submit(tenant, [None] * 40)
    dispatcher = stage.dispatcher()
    dispatcher.tick()
    held = sorted((row.id, row.attempt) for row in stage.ledger.jobs().values() if row.worker_id == worker)
    back = held[1]
    stage.ledger.complete(worker, [job for job in held if job != back])
    stage.ledger.release(worker, [back])
    stage.tick(dispatcher)
    assert stage.ledger.jobs()[back[0]].state == "leased"
    stage.ledger.check()


def test_what_was_resumed_before_the_place_where_claims_look_is_found(stage: Stage) -> None:
    tenant, worker = stage.ledger.add_tenant(), stage.ledger.start_worker(max_num_seqs=2)
    paused = stage.ledger.submit(tenant, [None] * 2)
    stage.ledger.flag(tenant, paused, "pause")
    stage.ledger.submit(tenant, [None] * 8)
    dispatcher = stage.dispatcher()
    dispatcher.tick()
    stage.ledger.flag(tenant, paused, "resume")
    first = True
    for _ in range(8):
        held = [(row.id, row.attempt) for row in stage.ledger.jobs().values() if row.worker_id == worker]
        stage.ledger.complete(worker, held)
        stage.tick(dispatcher)
        if first:
            resumed = [row.state for row in stage.ledger.jobs().values() if row.batch_id == paused]
            assert resumed == ["leased"] * 2, "they are the oldest of their lane"
            first = False
    assert set(stage.states()) == {"succeeded"}
    stage.ledger.check()


def test_jobs_past_their_deadline_expire_and_who_waits_for_them_is_rung(stage: Stage) -> None:
    tenant = stage.ledger.add_tenant()
    batch = stage.ledger.submit(tenant, [None] * 3)
    stage.ledger.let_deadline_pass(batch)
    with stage.redis.pubsub(ignore_subscribe_messages=True) as ear:
        ear.subscribe(DONE_CHANNEL)
        ear.get_message(timeout=5)
        stage.dispatcher().tick()
        assert stage.states() == ["expired"] * 3
        heard: list[bytes] = []

        def hears_it() -> bool:
            message = ear.get_message(timeout=0.1)
            heard.extend([message["data"]] if message else [])
            return batch.hex.encode() in heard

        wait_until(hears_it)
    stage.ledger.check()


def test_a_long_chore_is_spread_over_ticks_and_stops_no_plan(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    expire_one = functools.partial(flags.expire_queued, limit=1)

    def expire_slowly(conn: Connection) -> set[UUID]:
        stage.clock.now += 1.0
        return expire_one(conn)

    monkeypatch.setattr(flags, "expire_queued", expire_slowly)
    tenant = stage.ledger.add_tenant()
    stage.ledger.let_deadline_pass(stage.ledger.submit(tenant, [None] * 3))
    stage.ledger.start_worker(max_num_seqs=1)
    stage.dispatcher().tick()
    assert stage.states() == ["expired", "leased", "leased"]


def test_tenants_are_served_alike_however_much_one_asks_for(stage: Stage) -> None:
    greedy, modest = stage.ledger.add_tenant(), stage.ledger.add_tenant()
    worker = stage.ledger.start_worker(max_num_seqs=8)
    for _ in range(4):
        stage.ledger.submit(greedy, [None] * 50)
    stage.ledger.submit(modest, [None] * 40)
    dispatcher = stage.dispatcher()
    for _ in range(4):
        dispatcher.tick()
        held = [(row.id, row.attempt) for row in stage.ledger.jobs().values() if row.worker_id == worker]
        stage.ledger.complete(worker, held, num_tokens=10)
    ended = [row.tenant_id for row in stage.ledger.jobs().values() if row.state == "succeeded"]
    assert abs(ended.count(greedy) - ended.count(modest)) <= 2
    assert len(ended) == 64


def test_a_tenant_that_slept_saves_up_no_service(stage: Stage) -> None:
    steady, sleeper = stage.ledger.add_tenant(), stage.ledger.add_tenant()
    stage.ledger.start_worker()
    stage.ledger.submit(steady, [None] * 90)
    dispatcher = stage.dispatcher()
    dispatcher.tick()
    before = stage.service(steady)
    assert before > 0
    stage.ledger.submit(sleeper, [None] * 90)
    dispatcher.tick()
    assert stage.service(sleeper) >= before


def test_a_high_priority_comes_first(stage: Stage) -> None:
    tenant = stage.ledger.add_tenant()
    stage.ledger.start_worker(max_num_seqs=2)
    stage.ledger.submit(tenant, [None] * 10)
    urgent = stage.ledger.submit(tenant, [None] * 4, priority=batches.HIGH)
    stage.dispatcher().tick()
    assert {row.batch_id for row in stage.ledger.jobs().values() if row.state == "leased"} == {urgent}


def test_a_worker_is_told_which_adapters_come_next_and_when_none_do(stage: Stage) -> None:
    tenant = stage.ledger.add_tenant()
    worker = stage.ledger.start_worker(max_num_seqs=4)
    revisions = [stage.ledger.add_revision(tenant, f"adapter-{i}") for i in range(3)]
    for num_jobs, revision in zip((12, 6, 5), revisions, strict=True):
        stage.ledger.submit(tenant, [revision] * num_jobs)
    dispatcher = stage.dispatcher()
    dispatcher.tick()
    hints = [revision.hex for revision in revisions]
    wait_until(lambda: stage.messages(worker, "medley.expect") == [[hints[0], hints[1], hints[2]]])
    while any(row.state != "succeeded" for row in stage.ledger.jobs().values()):
        held = [(row.id, row.attempt) for row in stage.ledger.jobs().values() if row.worker_id == worker]
        stage.ledger.complete(worker, held)
        stage.tick(dispatcher)
    wait_until(lambda: stage.messages(worker, "medley.expect")[-1] == [])


def test_a_load_of_an_adapter_is_charged_with_the_jobs_that_cause_it(stage: Stage) -> None:
    tenant = stage.ledger.add_tenant()
    stage.ledger.start_worker(max_num_seqs=4)
    revision = stage.ledger.add_revision(tenant, "heavy", size_bytes=320_000_000)
    stage.ledger.submit(tenant, [revision] * 2)
    dispatcher = stage.dispatcher()
    dispatcher.tick()
    estimates = sum(row.est_tokens for row in stage.ledger.jobs().values())
    assert stage.service(tenant) == pytest.approx(estimates + 100)
    stage.ledger.submit(tenant, [revision])
    dispatcher.tick()
    estimates = sum(row.est_tokens for row in stage.ledger.jobs().values())
    assert stage.service(tenant) == pytest.approx(estimates + 100)


def test_a_batch_says_when_it_will_be_done_once_the_fleets_rate_is_seen(stage: Stage) -> None:
    tenant, worker = stage.ledger.add_tenant(), stage.ledger.start_worker(max_num_seqs=8)
    batch = stage.ledger.submit(tenant, [None] * 100)

    def expected() -> Any:
        with tenant_transaction(stage.ledger.api, tenant) as conn:
            row = batches.read_batch(conn, batch)
        assert row is not None
        return None if row.expected_at is None else (row.expected_at - row.read_at).total_seconds()

    dispatcher = stage.dispatcher()
    dispatcher.tick()
    assert expected() is None
    for _ in range(3):  # 8 jobs in 20 s
        held = [(row.id, row.attempt) for row in stage.ledger.jobs().values() if row.worker_id == worker]
        stage.ledger.complete(worker, held[:8])
        stage.tick(dispatcher)
    # A tick forecasts by the rate that the plan before it saw.
    stage.tick(dispatcher)
    assert expected() == pytest.approx((100 - 3 * 8) / 0.4, rel=0.5)


def test_a_batch_near_its_deadline_goes_first_while_no_rate_is_known(stage: Stage) -> None:
    tenant = stage.ledger.add_tenant()
    stage.ledger.start_worker(max_num_seqs=2)
    stage.ledger.submit(tenant, [None] * 10)
    soon = datetime.now(UTC) + timedelta(seconds=40)
    urgent = stage.ledger.submit(tenant, [None] * 4, deadline_at=soon)
    stage.dispatcher().tick()
    assert {row.batch_id for row in stage.ledger.jobs().values() if row.state == "leased"} == {urgent}


def test_without_redis_jobs_are_claimed_all_the_same_and_as_fast(stage: Stage, embedded: Any) -> None:
    tenant = stage.ledger.add_tenant()
    dispatcher = stage.dispatcher()

    def attempt() -> float:
        stage.ledger.start_worker(max_num_seqs=300)
        stage.ledger.submit(tenant, [None] * 300)
        with timed() as took:
            dispatcher.tick()
        assert set(stage.states()) == {"leased"}
        return took.seconds

    embedded.stop("redis")
    try:
        keeps_to(2, attempt)
    finally:
        embedded.start_redis()
