"""Changes of demand and counters: whoever follows them reads each once, whatever commits when, folds or fails."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from uuid import UUID

import pytest
from ledger import Ledger
from sqlalchemy import Connection, text

from medley.config import Settings
from medley.db import changes, demand
from medley.db.connections import make_engine, transaction
from medley.dispatcher.bookkeeper import FOLD_EVERY_S, WHOLE_EVERY_S, Bookkeeper
from medley.dispatcher.loop import Dispatcher
from medley.rings import Ringer
from medley.spec.ids import uuid7

NUM_LANES, NUM_WRITERS, SECONDS = 5, 4, 4.0


class Abandoned(Exception):
    """A writer's transaction that ends in nothing."""


class Followed:
    """Books kept by looks of their own, on a clock that the test moves."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.keeper = Bookkeeper(ledger.pool)
        self.now = 0.0

    def look(self) -> None:
        with self.ledger.working() as conn:
            self.keeper.look(conn, self.now)

    def fold(self) -> None:
        self.now += FOLD_EVERY_S
        self.keeper.fold(self._write, self.now, lambda: True)

    def _write(self, write: Callable[[Connection], bool]) -> bool:
        with self.ledger.working() as conn:
            return write(conn)

    @property
    def queued(self) -> dict[UUID, int]:
        return {waits.lane: waits.num_queued for waits in self.keeper.books.waiting()}

    def service(self, tenant: UUID) -> float:
        (account,) = self.keeper.books.accounts([tenant], {})
        return account.service


def come(conn: Connection, ledger: Ledger, tenant: UUID, lane: UUID, num: int) -> None:
    demand.add_demand(conn, ledger.pool, [demand.Change(lane, 1, tenant, lane, num, uuid7() if num > 0 else None)])


def test_books_equal_the_rows_under_writers_that_commit_late_or_never_and_folds_between(ledger: Ledger) -> None:
    tenant = ledger.add_tenant()
    lanes = [uuid7() for _ in range(NUM_LANES)]
    stop = threading.Event()
    counted: list[Counter[UUID]] = [Counter() for _ in range(NUM_WRITERS)]

    def write(number: int) -> None:
        draw = random.Random(number)
        engine = make_engine(ledger.work_url, name="writer", pool_size=1)
        while not stop.is_set():
            amounts = {draw.choice(lanes): draw.randint(1, 5) for _ in range(2)}
            try:
                with transaction(engine) as conn:
                    for lane, num in amounts.items():
                        come(conn, ledger, tenant, lane, num)
                        demand.charge(conn, ledger.pool, {tenant: float(num)})
                        time.sleep(draw.choice((0, 0, 0.002, 0.05)))
                    if draw.random() < 0.2:
                        raise Abandoned
            except Abandoned:
                continue
            counted[number].update(amounts)
        engine.dispose()

    followed = Followed(ledger)
    followed.look()
    threads = [threading.Thread(target=write, args=(number,)) for number in range(NUM_WRITERS)]
    for thread in threads:
        thread.start()
    draw, until = random.Random(0), time.monotonic() + SECONDS
    while time.monotonic() < until:
        followed.look()
        if draw.random() < 0.3:
            followed.fold()
        if draw.random() < 0.1:
            followed.now += WHOLE_EVERY_S
    stop.set()
    for thread in threads:
        thread.join()
    followed.look()
    total = sum(counted, Counter())
    assert total.total() > 100
    assert followed.queued == dict(total)
    assert followed.service(tenant) == pytest.approx(total.total())
    assert ledger.demand() == {(lane, 1): num for lane, num in total.items()}
    followed.fold()
    with ledger.working() as conn:
        left = text("SELECT count(*) FROM demand_changes WHERE pool = :pool")
        assert conn.execute(left, {"pool": ledger.pool}).scalar_one() == 0
    assert ledger.demand() == {(lane, 1): num for lane, num in total.items()}


def test_a_change_of_a_transaction_that_began_before_the_last_look_is_read_when_it_commits(ledger: Ledger) -> None:
    tenant, lane = ledger.add_tenant(), uuid7()
    followed = Followed(ledger)
    with ledger.working() as early:
        come(early, ledger, tenant, lane, 1)
        with ledger.working() as later:
            come(later, ledger, tenant, lane, 10)
        followed.look()
        assert followed.queued == {lane: 10}
        followed.fold()
    followed.look()
    assert followed.queued == {lane: 11}
    followed.look()
    assert followed.queued == {lane: 11}
    followed.fold()
    assert ledger.demand() == {(lane, 1): 11}


def test_a_fold_in_parts_or_that_was_rolled_back_changes_no_sum(ledger: Ledger) -> None:
    tenant, lane = ledger.add_tenant(), uuid7()
    for num in (5, -2, 4, 3):
        with ledger.working() as conn:
            come(conn, ledger, tenant, lane, num)
            demand.charge(conn, ledger.pool, {tenant: float(num)})
    with ledger.working() as conn:
        seen = changes.read_whole(conn, ledger.pool).horizon
    folding = changes.Folding(seen, 0, 0)
    with ledger.working() as conn:
        assert not changes.fold(conn, ledger.pool, folding, limit=3)
    assert ledger.demand() == {(lane, 1): 10}
    with ledger.work.connect() as conn:
        changes.fold(conn, ledger.pool, changes.Folding(seen, folding.demand, folding.counters))
        conn.rollback()
    assert ledger.demand() == {(lane, 1): 10}
    with ledger.working() as conn:
        assert changes.fold(conn, ledger.pool, folding, limit=3)
    assert ledger.demand() == {(lane, 1): 10}
    with ledger.working() as conn:
        kept = text("SELECT num_queued FROM demand_sums WHERE pool = :pool")
        assert conn.execute(kept, {"pool": ledger.pool}).scalar_one() == 10


def test_a_look_reads_what_is_new_however_many_dead_changes_an_old_snapshot_keeps(ledger: Ledger) -> None:
    tenant, lane = ledger.add_tenant(), uuid7()
    followed = Followed(ledger)
    followed.look()
    engine = make_engine(ledger.work_url, name="old", pool_size=1)
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as old:
        old.execute(text("SELECT count(*) FROM demand_changes"))
        with ledger.working() as conn:
            demand.add_demand(conn, ledger.pool, [demand.Change(lane, 1, tenant, lane, 1)] * 50_000)
        followed.look()
        followed.fold()
        ledger.analyze()
        with ledger.working() as conn:
            come(conn, ledger, tenant, lane, 1)
        seen = followed.keeper.books.horizon
        with ledger.working() as conn:
            found = conn.exec_driver_sql(
                "EXPLAIN (ANALYZE, BUFFERS, COSTS OFF, TIMING OFF) " + changes._READ_SINCE,
                {"pool": ledger.pool, "end": seen.end, "running": list(seen.running)},
            ).scalars()
            plan = "\n".join(found)
        assert "Seq Scan on demand_changes" not in plan
        hits = next(line for line in plan.splitlines() if "Buffers: shared" in line)
        assert int(hits.split("hit=")[1].split()[0]) < 100, plan
        followed.look()
        assert followed.queued == {lane: 50_001}
    engine.dispose()


def test_a_leader_reads_changes_that_a_backup_brought_once(ledger: Ledger, redis_url: str) -> None:
    """Their transactions' numbers are another server's, far ahead of this one's."""
    tenant = ledger.add_tenant()
    ledger.submit(tenant, [None] * 3)
    with ledger.working() as conn:
        conn.execute(text("UPDATE demand_changes SET xact = xact + 1000000 WHERE pool = :p"), {"p": ledger.pool})
    engine, ringer = make_engine(ledger.work_url, name="dispatcher", pool_size=1), Ringer(redis_url)
    settings = Settings(
        database_url=ledger.work_url,
        redis_url=redis_url,
        store_url="file:///nowhere",
        model=None,
        pool=ledger.pool,
        tick_s=20.0,  # of the clock here; terms last 60 s of the database's
    )
    now = 0.0
    dispatcher = Dispatcher(engine, settings, ringer, clock=lambda: now)
    for _ in range(3):
        now += settings.tick_s
        dispatcher.tick()
        glance = dispatcher.glance()
        assert glance is not None
        assert glance.num_queued == 3
    ringer.close()
    engine.dispose()
