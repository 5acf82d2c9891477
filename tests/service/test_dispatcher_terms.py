"""Who leads, for how long, and who follows: dispatchers on real rows, and their process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import text
from staging import Stage
from waiting import wait_until

from medley.rings import pool_channel


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
            text("UPDATE leaders SET until = clock_timestamp() + interval '20 s' WHERE pool = :pool"), stage.own
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
    assert process.wait(timeout=30) == 0
    with stage.ledger.working() as conn:
        statement = text("SELECT until <= clock_timestamp() FROM leaders WHERE pool = :pool")
        assert conn.execute(statement, {"pool": stage.ledger.pool}).scalar_one()
