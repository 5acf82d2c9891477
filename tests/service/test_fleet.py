"""The operator's hand on the fleet: holds in rows, who may write them, the log, and the commands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from click.testing import CliRunner, Result
from ledger import Ledger
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from medley.cli import main
from medley.db import fleet, queue, workers
from medley.db.batches import NORMAL
from medley.db.fleet import Steer
from medley.db.workers import WorkerState
from medley.dispatcher.loop import Dispatcher
from medley.rings import Ringer


class Hand:
    """The operator: the owner's connections, and the command line with the owner's URL."""

    def __init__(self, database: Any, redis_url: str, ledger: Ledger) -> None:
        self.ledger = ledger
        self.engine = create_engine(database.url("medley_owner"))
        self._env = {"MEDLEY_DATABASE_URL": database.url("medley_owner"), "MEDLEY_REDIS_URL": redis_url}

    def steer(self, worker: UUID, how: Steer) -> tuple[str, str, str | None]:
        with self.engine.begin() as conn:
            row = fleet.steer(conn, worker, how, "me")
        assert row is not None
        return row.state, row.desired_state, row.held_state

    def run(self, *args: str) -> Result:
        return CliRunner().invoke(main, args, env=self._env, prog_name="medley", catch_exceptions=False)

    def lines(self, *args: str) -> list[str]:
        done = self.run(*args)
        assert done.exit_code == 0, done.output
        return done.stdout.splitlines()

    def json(self, *args: str) -> list[Any]:
        return [json.loads(line) for line in self.lines(*args, "--json")]


@pytest.fixture
def hand(database: Any, embedded: Any) -> Iterator[Hand]:
    ledger = Ledger(database)
    hand = Hand(database, embedded.redis_url, ledger)
    yield hand
    hand.engine.dispose()
    ledger.close()


def test_each_word_does_what_it_says(hand: Hand) -> None:
    ledger = hand.ledger
    tenant = ledger.add_tenant()
    busy, idle, asleep = ledger.start_worker(), ledger.start_worker(), ledger.start_worker(WorkerState.ASLEEP)
    ledger.submit(tenant, [None, None])
    ledger.claim(busy, [(tenant, 2)])
    assert hand.steer(busy, Steer.SLEEP) == ("active", "active", "asleep")  # once its jobs have ended
    assert hand.steer(idle, Steer.SLEEP) == ("active", "asleep", "asleep")
    assert hand.steer(busy, Steer.DRAIN) == ("active", "draining", "asleep")
    assert hand.steer(asleep, Steer.DRAIN) == ("asleep", "asleep", "asleep")
    assert hand.steer(asleep, Steer.WAKE) == ("asleep", "active", "active")
    assert hand.steer(asleep, Steer.RELEASE) == ("asleep", "active", None)


def test_a_worker_that_is_gone_cannot_be_steered(hand: Hand) -> None:
    worker = hand.ledger.start_worker()
    hand.ledger.lapse(worker)
    with hand.engine.begin() as conn:
        assert fleet.steer(conn, worker, Steer.WAKE, "me") is None
        assert fleet.steer(conn, uuid4(), Steer.WAKE, "me") is None
        assert fleet.read_log(conn, None, 10) == []


def test_the_dispatchers_word_passes_over_a_hold_and_its_role_cannot_end_one(hand: Hand) -> None:
    worker = hand.ledger.start_worker()
    hand.steer(worker, Steer.SLEEP)
    with hand.ledger.working() as conn:
        assert not workers.desire(conn, worker, WorkerState.ACTIVE)
        assert not workers.desire(conn, worker, WorkerState.DRAINING)
    assert hand.ledger.renew(worker) is WorkerState.ASLEEP
    with pytest.raises(DBAPIError, match="permission denied"), hand.ledger.working() as conn:
        conn.execute(text("UPDATE workers SET held_state = NULL, held_at = NULL"))
    hand.steer(worker, Steer.RELEASE)
    with hand.ledger.working() as conn:
        assert workers.desire(conn, worker, WorkerState.ACTIVE)


def test_a_claim_that_was_planned_before_a_hold_gives_nothing(hand: Hand) -> None:
    tenant, worker = hand.ledger.add_tenant(), hand.ledger.start_worker()
    hand.ledger.submit(tenant, [None])
    with hand.engine.begin() as conn:  # held with a job that has ended by now: it stands active
        conn.execute(text("UPDATE workers SET held_state = 'asleep', held_by = 'me', held_at = clock_timestamp()"))
    with hand.ledger.working() as conn:
        assert queue.claim(conn, hand.ledger.pool, [queue.Want(worker, tenant, NORMAL, 5)]) == []


def test_a_dispatcher_plans_around_holds(hand: Hand, database: Any, embedded: Any) -> None:
    from medley.config import Settings

    ledger = hand.ledger
    tenant = ledger.add_tenant()
    one, other = (ledger.start_worker(WorkerState.ASLEEP, max_num_seqs=1) for _ in range(2))
    with ledger.working() as conn:
        conn.execute(text("UPDATE workers SET desired_state = 'asleep'"))
    hand.steer(one, Steer.SLEEP)
    ledger.submit(tenant, [None] * 50)
    settings = Settings(
        database_url=database.url("medley_work"),
        redis_url=embedded.redis_url,
        store_url="file:///nowhere",
        model=None,
        pool=ledger.pool,
        tick_s=20.0,
    )
    ringer = Ringer(embedded.redis_url)
    dispatcher = Dispatcher(ledger.work, settings, ringer)

    def desired() -> dict[UUID, str]:
        dispatcher.tick()
        with ledger.working() as conn:
            return {row.id: row.desired_state for row in workers.read_workers(conn, ledger.pool)}

    assert desired() == {one: "asleep", other: "active"}
    ledger.renew(other, WorkerState.ACTIVE, max_num_seqs=1)
    assert desired() == {one: "asleep", other: "active"}
    hand.steer(one, Steer.RELEASE)
    assert desired() == {one: "active", other: "active"}
    ringer.close()


def test_the_log_tells_who_did_what_and_cannot_be_rewritten(hand: Hand) -> None:
    worker = hand.ledger.start_worker()
    hand.steer(worker, Steer.DRAIN)
    hand.steer(worker, Steer.RELEASE)
    [released, drained] = hand.json("fleet", "log", "--pool", hand.ledger.pool)
    assert [released["action"], drained["action"]] == ["worker.release", "worker.drain"]
    assert drained["by"] == "me"
    assert drained["worker"] == f"worker_{worker.hex}"
    with pytest.raises(DBAPIError, match="append-only"), hand.engine.begin() as conn:
        conn.execute(text("DELETE FROM fleet_log"))


def test_the_list_shows_what_workers_are_told_and_do(hand: Hand) -> None:
    worker = hand.ledger.start_worker()
    hand.ledger.submit(hand.ledger.add_tenant(), [None] * 3)
    summary, headers, row = hand.lines("fleet", "list", "--pool", hand.ledger.pool)
    assert summary.startswith(f"# pool {hand.ledger.pool}: 1 worker (1 active), 3 jobs wait, 0 of 8 rows run")
    cells = dict(zip(headers.split("\t"), row.split("\t"), strict=True))
    assert worker.hex.startswith(cells["worker"])
    assert (cells["state"], cells["rows"], cells["jobs"]) == ("active", "0/8", "0")
    [value] = hand.json("fleet", "--pool", hand.ledger.pool)
    assert (value["id"], value["state"], value["held_state"]) == (f"worker_{worker.hex}", "active", None)
    assert hand.lines("fleet", "--pool", "elsewhere")[0].startswith("# pool elsewhere: 0 workers, 0 jobs wait")


def test_beginnings_of_ids_name_workers_unless_they_name_two(hand: Hand) -> None:
    first, second = hand.ledger.start_worker(), hand.ledger.start_worker()
    common = next(first.hex[:n] for n in range(31, 0, -1) if second.hex.startswith(first.hex[:n]))
    pool = ("--pool", hand.ledger.pool)
    refused = hand.run("fleet", "drain", common, "zz", *pool)
    assert refused.exit_code == 2
    for part in (f"'{common}' begins 2 ids", "no living worker's id begins with 'zz'"):
        assert part in refused.output
    assert all(value["held_state"] is None for value in hand.json("fleet", *pool)), "nothing was done"
    [line] = hand.lines("fleet", "sleep", f"worker_{second.hex}", *pool)
    assert line.split("\t")[1].startswith("active > asleep (held by ")
    [value] = hand.json("fleet", "wake", second.hex[:20])
    assert (value["held_state"], value["desired_state"]) == ("active", "active")
    assert len(hand.lines("fleet", "release", "--all", *pool)) == 2
    assert hand.run("fleet", "release").exit_code == 2


def test_a_worker_that_fell_silent_is_shown_as_lapsed_and_all_leaves_it_out(hand: Hand) -> None:
    silent, living = hand.ledger.start_worker(), hand.ledger.start_worker()
    hand.ledger.lapse(silent)
    pool = ("--pool", hand.ledger.pool)
    rows = hand.lines("fleet", *pool)[2:]
    assert [row.split("\t")[3] for row in rows] == ["active (lapsed)", "active"]
    [value] = hand.json("fleet", "sleep", "--all", *pool)
    assert value["id"] == f"worker_{living.hex}"
    refused = hand.run("fleet", "wake", silent.hex)
    assert refused.exit_code == 1
    assert "has lapsed; nothing was done" in refused.output


def test_top_shows_who_runs_by_name_and_forgets_it_with_the_worker(hand: Hand) -> None:
    ledger = hand.ledger
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    revision = ledger.add_revision(tenant, "poet")
    unknown = uuid4()
    shares = [[tenant.hex, revision.hex, 5, 1, 9], [tenant.hex, None, 2, 0, 0], [unknown.hex, unknown.hex, 1, 0, 0]]
    ledger.renew(
        worker,
        stats={"num_running": 8, "tokens_per_s": 123.4, "pages_used": 3, "num_pages": 9},
        batch={"shares": shares, "others": [1, 0, 4, 2]},
    )
    summary, _, *rows = hand.lines("top", "--pool", ledger.pool)
    assert "rows 8/8, 123 tok/s" in summary
    assert "pages 3/9" in summary
    with hand.engine.begin() as conn:
        name = conn.execute(text("SELECT name FROM tenants WHERE id = :id"), {"id": tenant}).scalar_one()
    assert rows[:2] == [f"{name}\tpoet\t5\t1\t9", f"{name}\t(base)\t2\t0\t0"]
    assert rows[3] == "2 more\t\t1\t0\t4"
    [value] = hand.json("top", "--pool", ledger.pool)
    assert value["batch"][0] == {"tenant": name, "adapter": "poet", "decoding": 5, "prefilling": 1, "waiting": 9}
    with ledger.working() as conn:
        workers.leave(conn, worker)
        assert conn.execute(text("SELECT count(*) FROM worker_batches")).scalar_one() == 0
    assert hand.lines("top", "--pool", ledger.pool)[0] == "# no worker is active (0 live)"


def test_what_runs_for_whom_is_hidden_from_the_api(hand: Hand) -> None:
    with pytest.raises(DBAPIError, match="permission denied"), hand.ledger.api.begin() as conn:
        conn.execute(text("SELECT * FROM worker_batches"))
