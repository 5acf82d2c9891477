"""The dispatcher on real rows and a real Redis: it leads, claims, rings, takes back, wakes; and ends in good order."""

from __future__ import annotations

import base64
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import redis
from ledger import Ledger
from sqlalchemy import Connection, text
from waiting import wait_until

from medley.celery_app import worker_queue
from medley.config import Settings
from medley.db import batches, flags
from medley.db.connections import make_engine, tenant_transaction
from medley.db.workers import WorkerState
from medley.dispatcher.loop import Dispatcher
from medley.dispatcher.plans import Rules
from medley.rings import DONE_CHANNEL, Ringer, pool_channel


class Clock:
    """A clock that a test moves, so that ticks need no waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.step_s = 0.0

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


class Stage:
    """A ledger with dispatchers whose clock stands in the test's hand."""

    def __init__(self, database: Any, redis_url: str) -> None:
        self.ledger = Ledger(database)
        self.clock = Clock()
        self.redis = redis.Redis.from_url(redis_url)
        self.settings = Settings(
            database_url=database.url("medley_work"),
            redis_url=redis_url,
            store_url="file:///nowhere",
            model=None,
            pool=self.ledger.pool,
            tick_s=20.0,  # of the stage's clock; terms last 60 s of the database's
        )
        self._ringer = Ringer(redis_url)
        self._engines = [self.ledger.work]

    def dispatcher(self, **rules: Any) -> Dispatcher:
        engine = make_engine(self.settings.database_url, name="dispatcher", pool_size=1)
        self._engines.append(engine)
        return Dispatcher(engine, self.settings, self._ringer, rules=Rules(**rules), clock=self.clock)

    def tick(self, dispatcher: Dispatcher) -> float:
        """A turn after a whole tick has passed."""
        self.clock.now += self.settings.tick_s
        return dispatcher.tick()

    @property
    def own(self) -> dict[str, str]:
        return {"pool": self.ledger.pool}

    def end_term(self) -> None:
        with self.ledger.working() as conn:
            conn.execute(text("UPDATE leaders SET until = clock_timestamp() WHERE pool = :pool"), self.own)

    def messages(self, worker: UUID, task: str = "medley.run_jobs") -> list[list[str]]:
        """The ids of each message of a task that waits in the worker's queue, oldest first."""
        found = []
        for raw in reversed(self.redis.lrange(worker_queue(worker), 0, -1)):
            message = json.loads(raw)
            if message["headers"]["task"] == task:
                args, _, _ = json.loads(base64.b64decode(message["body"]))
                found.append(args[0])
        return found

    def states(self) -> list[str]:
        return sorted(row.state for row in self.ledger.jobs().values())

    def desired(self, worker: UUID) -> str:
        with self.ledger.working() as conn:
            statement = text("SELECT desired_state FROM workers WHERE id = :id")
            state: str = conn.execute(statement, {"id": worker}).scalar_one()
        return state

    def service(self, tenant: UUID) -> float:
        with self.ledger.working() as conn:
            statement = text("SELECT service FROM tenant_counters WHERE tenant_id = :id")
            found: float = conn.execute(statement, {"id": tenant}).scalar_one()
        return found

    def close(self) -> None:
        self._ringer.close()
        self.redis.close()
        for engine in self._engines:
            engine.dispose()
        self.ledger.close()


@pytest.fixture
def stage(module_database: Any, redis_url: str) -> Iterator[Stage]:
    made = Stage(module_database, redis_url)
    yield made
    made.close()


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


def test_a_leader_whose_term_ran_out_goes_on_with_what_it_knew_unless_another_has_led(stage: Stage) -> None:
    """A machine that is too busy for a term must not make a leader begin anew each time: it would never get further."""
    tenant = stage.ledger.add_tenant()
    stage.ledger.start_worker(max_num_seqs=2)
    stage.ledger.submit(tenant, [None] * 8)
    first, second = stage.dispatcher(), stage.dispatcher()
    stage.tick(first)
    known = first._keeper
    stage.end_term()
    stage.tick(first)
    assert first.term == 2
    assert first._keeper is known
    stage.end_term()
    stage.tick(second)
    assert second.term == 3
    stage.tick(first)
    assert first.term is None
    second.resign()
    stage.tick(first)
    assert first.term == 4
    assert first._keeper is not known
    stage.ledger.check()


def test_a_term_is_prolonged_within_a_turn_that_takes_longer_than_a_tick(stage: Stage) -> None:
    tenant = stage.ledger.add_tenant()
    stage.ledger.submit(tenant, [None])
    dispatcher = stage.dispatcher()
    stage.tick(dispatcher)
    stage.clock.step_s = stage.settings.tick_s  # each look at the clock is a tick later
    with stage.ledger.working() as conn:
        conn.execute(
            text("UPDATE leaders SET until = clock_timestamp() + interval '1 s' WHERE pool = :pool"), stage.own
        )
    dispatcher._lead.write(lambda _: None)
    with stage.ledger.working() as conn:
        left = text("SELECT until > clock_timestamp() + interval '30 s' FROM leaders WHERE pool = :pool")
        assert conn.execute(left, stage.own).scalar_one()
    assert dispatcher.term == 1


def test_only_one_leads_and_a_standby_follows_a_resignation_at_once(stage: Stage) -> None:
    tenant = stage.ledger.add_tenant()
    stage.ledger.start_worker()
    first, second = stage.dispatcher(), stage.dispatcher()
    first.tick()
    stage.ledger.submit(tenant, [None])
    assert second.tick() == stage.settings.tick_s
    assert (first.term, second.term) == (1, None)
    assert stage.states() == ["queued"]
    first.resign()
    stage.tick(second)
    assert (first.term, second.term) == (None, 2)
    assert stage.states() == ["leased"]


def test_a_leader_whose_term_ran_out_unnoticed_claims_nothing(stage: Stage) -> None:
    tenant = stage.ledger.add_tenant()
    stage.ledger.start_worker()
    stopped, second = stage.dispatcher(), stage.dispatcher()
    stopped.tick()
    with stage.ledger.working() as conn:
        conn.execute(
            text("UPDATE leaders SET until = clock_timestamp() WHERE pool = :pool"), {"pool": stage.ledger.pool}
        )
    second.tick()
    stage.ledger.submit(tenant, [None])
    stopped.tick()
    assert stopped.term is None
    assert stage.states() == ["queued"]
    stage.tick(second)
    assert second.term == 2
    assert stage.states() == ["leased"]


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
    stage.ledger.start_worker(max_num_seqs=300)
    stage.ledger.submit(tenant, [None] * 300)
    dispatcher = stage.dispatcher()
    embedded.stop("redis")
    try:
        began = time.monotonic()
        dispatcher.tick()
        assert time.monotonic() - began < 2
    finally:
        embedded.start_redis()
    assert stage.states() == ["leased"] * 300


@pytest.fixture
def process(stage: Stage) -> Iterator[subprocess.Popen[bytes]]:
    environ = os.environ | {
        "MEDLEY_DATABASE_URL": stage.settings.database_url,
        "MEDLEY_REDIS_URL": stage.settings.redis_url,
        "MEDLEY_STORE_URL": stage.settings.store_url,
        "MEDLEY_POOL": stage.ledger.pool,
        "MEDLEY_TICK_S": "0.5",
    }
    program = "from medley.config import Settings; from medley.dispatcher.loop import run; run(Settings.from_env())"
    with subprocess.Popen([sys.executable, "-c", program], env=environ) as running:
        yield running
        running.kill()


@pytest.mark.faults
def test_the_process_outlives_its_servers_and_resigns_on_sigterm(
    stage: Stage, process: subprocess.Popen[bytes], embedded: Any
) -> None:
    tenant = stage.ledger.add_tenant()
    stage.ledger.start_worker(max_num_seqs=100)
    stage.ledger.submit(tenant, [None] * 3)
    wait_until(lambda: stage.states() == ["leased"] * 3)

    embedded.kill("postgres")
    embedded.stop("redis")
    embedded.start_postgres()
    embedded.start_redis()
    stage.ledger.submit(tenant, [None] * 3)
    wait_until(lambda: stage.states() == ["leased"] * 6)

    # A ring comes sooner than a tick.
    stage.ledger.submit(tenant, [None])
    stage.redis.publish(pool_channel(stage.ledger.pool), "")
    wait_until(lambda: stage.states() == ["leased"] * 7)

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 0
    with stage.ledger.working() as conn:
        statement = text("SELECT until <= clock_timestamp() FROM leaders WHERE pool = :pool")
        assert conn.execute(statement, {"pool": stage.ledger.pool}).scalar_one()
