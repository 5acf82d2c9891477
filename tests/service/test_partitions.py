"""Partitions of inputs and results: made, found by their id alone, closed to all but the parent's readers, dropped."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from aging import day_before, days_ago, end_aged, make_partitions, run_aged, submit_aged
from ledger import Ledger, reserve
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import ProgrammingError

from medley.db import batches, inputs, partitions
from medley.db.connections import tenant_transaction
from medley.db.migrate import downgrade, upgrade
from medley.db.new_jobs import NewJob, append_jobs
from medley.db.results import _READ_JOB, _READ_PLAIN, read_job, read_results
from medley.spec.ids import oldest_after, uuid7
from medley.tasks.retention import keep_retention


@pytest.fixture
def own(database: Any) -> Iterator[Ledger]:
    """On a database of this test's own."""
    made = Ledger(database)
    yield made
    made.close()


def as_owner(database: Any, act: Any) -> Any:
    engine = create_engine(database.url("medley_owner"))
    try:
        with engine.begin() as connection:
            return act(connection)
    finally:
        engine.dispose()


def names(conn: Connection, table: str = "job_results") -> list[str]:
    return [p.name for p in partitions.read_partitions(conn, table)]


def rows_of(database: Any, partition: str) -> int:
    count: int = as_owner(database, lambda c: c.execute(text(f"SELECT count(*) FROM partitions.{partition}")).scalar())
    return count


def test_a_new_database_has_a_partition_for_today_and_the_next_days(own: Ledger) -> None:
    days = [day_before(-n) for n in range(partitions.AHEAD_DAYS + 1)]
    with own.working() as conn:
        for table in partitions.TABLES:
            assert names(conn, table) == [f"{table}_{day:%Y%m%d}" for day in days]
    assert make_partitions(own) == 0


def test_what_has_no_partition_works_and_is_moved_into_one(own: Ledger, database: Any) -> None:
    tenant = own.add_tenant()
    batch = run_aged(own, tenant, 20, [None] * 3)
    submit_aged(own, tenant, 5)
    submit_aged(own, tenant, -30)
    assert rows_of(database, "job_inputs_default") == 5
    assert make_partitions(own) == 3
    with own.working() as conn:
        assert f"job_inputs_{day_before(20):%Y%m%d}" in names(conn, "job_inputs")
        assert f"job_inputs_{day_before(5):%Y%m%d}" in names(conn, "job_inputs")
    assert make_partitions(own) == 0
    assert rows_of(database, "job_inputs_default") == 1, "a day that is far ahead waits for its time"
    assert rows_of(database, f"job_results_{day_before(20):%Y%m%d}") == 3
    with tenant_transaction(own.api, tenant) as conn:
        assert [row.seq for row in read_results(conn, batch, after=0, limit=10)] == [1, 2, 3]


def test_a_partition_cannot_be_read_around_its_parent(own: Ledger, database: Any) -> None:
    tenant = own.add_tenant()
    run_aged(own, tenant, 0)
    found = as_owner(
        database,
        lambda conn: conn.execute(
            text(
                "SELECT relname, relrowsecurity AND relforcerowsecurity AS is_forced FROM pg_class"
                " WHERE relnamespace = 'partitions'::regnamespace AND relkind = 'r'"
            )
        ).all(),
    )
    assert len(found) == 2 * (partitions.AHEAD_DAYS + 2)
    assert all(row.is_forced for row in found)
    for row in found:
        for engine in (own.api, own.work):
            with pytest.raises(ProgrammingError, match="permission denied for schema"), engine.begin() as conn:
                conn.execute(text(f"SELECT * FROM partitions.{row.relname}"))

    # Not even a careless grant opens one: it has no policy for anyone but the owner.
    def grant(conn: Connection) -> None:
        conn.execute(text("GRANT USAGE ON SCHEMA partitions TO medley_api"))
        conn.execute(text("GRANT SELECT ON ALL TABLES IN SCHEMA partitions TO medley_api"))

    as_owner(database, grant)
    for row in found:
        with tenant_transaction(own.api, tenant) as conn:
            assert conn.execute(text(f"SELECT * FROM partitions.{row.relname}")).all() == []
            assert len(conn.execute(text("SELECT * FROM job_results")).all()) == 1


def test_the_api_can_neither_make_nor_drop_nor_erase(own: Ledger) -> None:
    for call in (
        "medley_make_partition('job_inputs', '2020-01-01')",
        "medley_drop_partition('job_inputs_default')",
        f"medley_erase('{uuid7()}', 'jobs', ARRAY['tenant_id'])",
    ):
        with pytest.raises(ProgrammingError, match="permission denied for function"), own.api.begin() as conn:
            conn.execute(text(f"SELECT {call}"))


def test_a_day_is_dropped_once_no_job_of_it_is_left_and_not_before(own: Ledger) -> None:
    tenant = own.add_tenant()
    gone, waiting = run_aged(own, tenant, 40), submit_aged(own, tenant, 41)
    kept = run_aged(own, tenant, 10)
    make_partitions(own)
    done = keep_retention(own.work)
    day = f"{day_before(40):%Y%m%d}"
    assert sorted(done.partitions) == [f"job_inputs_{day}", f"job_results_{day}"]
    assert (done.num_batches, done.num_jobs) == (1, 1)
    left = own.jobs().values()
    assert {row.batch_id for row in left} == {waiting, kept}
    with own.working() as conn:
        assert conn.execute(text("SELECT count(*) FROM batches WHERE id = :id"), {"id": gone}).scalar_one() == 0
        assert partitions.drop(conn, "job_results") == [], "a job that waits holds its day"
    # It can still run, and its result is kept from its end on.
    end_aged(own, waiting, 0)
    with tenant_transaction(own.api, tenant) as conn:
        assert len(read_results(conn, waiting, after=0, limit=10)) == 1
    keep_retention(own.work)
    with own.working() as conn:
        assert f"job_results_{day_before(41):%Y%m%d}" in names(conn)


def test_a_drop_waits_for_no_one_for_long_and_a_submit_beside_it_loses_nothing(own: Ledger) -> None:
    tenant = own.add_tenant()
    run_aged(own, tenant, 40)
    make_partitions(own)
    own.api.connect().close()
    with days_ago(40), tenant_transaction(own.api, tenant) as conn:
        # Of the same day, and not committed while the partition is to be dropped.
        batch = batches.NewBatch(uuid7(), tenant, own.pool)
        batches.open_batch(conn, batch, total=1)
        append_jobs(conn, batch, [NewJob("a prompt", None, None, None, '{"max_tokens": 4}', 4)])
        done: list[Any] = []
        dropping = threading.Thread(target=lambda: done.append(keep_retention(own.work)))
        dropping.start()
        dropping.join(timeout=30)
        # Of its results there are none yet: they find the default partition.
        assert not [name for name in done[0].partitions if name.startswith("job_inputs")]
    assert keep_retention(own.work).partitions == []
    [job] = [row.id for row in own.jobs().values() if row.batch_id == batch.id]
    end_aged(own, batch.id, 0)
    with tenant_transaction(own.api, tenant) as conn:
        assert read_job(conn, job) is not None
        assert len(read_results(conn, batch.id, after=0, limit=10)) == 1


def _touched(plan: str) -> set[str]:
    """The days whose partitions a plan reads."""
    return {
        word.rpartition("_")[2]
        for word in plan.replace('"', " ").split()
        if word.startswith(("job_inputs_", "job_results_")) and word.rpartition("_")[2].isdigit()
    }


def test_statements_of_the_hot_paths_read_the_days_of_their_jobs_alone(own: Ledger) -> None:
    tenant = own.add_tenant()
    batch = run_aged(own, tenant, 20, [None] * 50)
    for days in range(1, 30):
        run_aged(own, tenant, days)
    while make_partitions(own):
        pass
    own.analyze()
    jobs = [row.id for row in own.jobs().values() if row.batch_id == batch]
    read = _READ_JOB
    with tenant_transaction(own.api, tenant) as conn:

        def plan_of(statement: Any, parameters: dict[str, Any]) -> str:
            plan = conn.execute(text("EXPLAIN (ANALYZE, COSTS off, TIMING off) " + statement.text), parameters)
            return "\n".join(line for line in plan.scalars() if "never executed" not in line)

        # Of tables as small as these it would read the whole.
        conn.execute(text("SET LOCAL enable_seqscan = off"))
        reads = read.format_where("j.id = ANY(:ids)")
        plans = {
            what: plan_of(reads, {"ids": ids, "first": min(ids), "last": max(ids)})
            for what, ids in {"a job": jobs[:1], "jobs": jobs}.items()
        }
        page = {"batch": batch, "after": 0, "oldest": oldest_after(batch), "limit": 10, "only_latest": True}
        results = plan_of(_READ_PLAIN, page)
    with own.working() as conn:
        conn.execute(text("SET LOCAL enable_seqscan = off"))
        fetch = conn.exec_driver_sql(
            "EXPLAIN (COSTS off) " + inputs._FETCH,
            {"worker": uuid7(), "jobs": jobs, "first": min(jobs), "last": max(jobs)},
        )
        plans["inputs"] = "\n".join(fetch.scalars())
    for what, plan in plans.items():
        assert _touched(plan) <= {f"{day_before(20):%Y%m%d}"}, f"{what}:\n{plan}"
    assert min(_touched(results)) >= f"{day_before(21):%Y%m%d}", results
    assert "Seq Scan on job_" not in "\n".join([*plans.values(), results])


def test_results_of_one_batch_are_numbered_without_gap_or_repeat_whoever_stores_them(own: Ledger) -> None:
    """No index holds (batch_id, seq) unique over partitions: the lock on the batch does."""
    tenant = own.add_tenant()
    with days_ago(1):
        batch = batches.NewBatch(uuid7(), tenant, own.pool)
    new = [NewJob("a prompt", None, None, None, '{"max_tokens": 4}', 4)] * 60
    with tenant_transaction(own.api, tenant) as conn:
        batches.open_batch(conn, batch, total=120)
        with days_ago(1):
            append_jobs(conn, batch, new)
        append_jobs(conn, batch, new)
        reserve(conn, batch, 120)
    workers = [own.start_worker(max_num_seqs=60) for _ in range(2)]
    held = [own.claim(worker, [(tenant, 60)]) for worker in workers]

    def store(worker: UUID, mine: Any) -> None:
        for claimed in mine:
            own.complete(worker, [(claimed.job, claimed.attempt)])

    threads = [threading.Thread(target=store, args=pair) for pair in zip(workers, held, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    with tenant_transaction(own.api, tenant) as conn:
        rows = read_results(conn, batch.id, after=0, limit=1_000)
    assert [row.seq for row in rows] == list(range(1, 121))
    own.check()


def test_a_filled_database_is_moved_up_and_down_with_every_row(own: Ledger, database: Any) -> None:
    tenant = own.add_tenant()
    made = [run_aged(own, tenant, days, [None, own.add_revision(tenant, f"a{days}")]) for days in (50, 3, 0)]
    ahead = run_aged(own, tenant, -20)

    def content(conn: Connection) -> list[Any]:
        """Without columns that are later than the version it goes down to: they are null in these rows."""
        return [
            conn.execute(text(f"SELECT jsonb_strip_nulls(to_jsonb(x)) FROM {table} x ORDER BY x.job_id"))
            .scalars()
            .all()
            for table in partitions.TABLES
        ]

    with own.working() as conn:
        before = content(conn)
    own.work.dispose()
    own.api.dispose()
    downgrade(database.url("medley_owner"), "0004")
    with own.working() as conn:
        assert content(conn) == before
        assert (
            "UNIQUE"
            in conn.execute(
                text("SELECT indexdef FROM pg_indexes WHERE indexname = 'job_results_batch_id_seq'")
            ).scalar_one()
        )
    upgrade(database.url("medley_owner"))
    with own.working() as conn:
        assert content(conn) == before
        [first, *rest] = names(conn)
        assert first == "job_results_before"
        assert len(rest) == partitions.AHEAD_DAYS
    assert make_partitions(own) == 0
    assert rows_of(database, "job_results_default") == 1
    with tenant_transaction(own.api, tenant) as conn:
        for batch in (made[1], made[2], ahead):
            assert read_results(conn, batch, after=0, limit=10)
        own_rows = conn.execute(text("SELECT count(*) FROM job_inputs")).scalar_one()
    assert own_rows == 7 - 2, "what is older than the tenant keeps is not seen"
    # What an old first partition held goes by rows, as later days in it are kept.
    keep_retention(own.work)
    with own.working() as conn:
        conn.execute(text("UPDATE expired_jobs SET since = since - interval '2 days'"))
    keep_retention(own.work)
    assert rows_of(database, "job_results_before") == 4


def test_a_days_bounds_are_those_of_its_ids() -> None:
    with days_ago(12.25):
        job = uuid7()
    day = partitions.day_of(job)
    assert day == day_before(12.25)
    assert partitions.first_of(day) <= job < partitions.first_of(day + timedelta(days=1))
