"""Results on their way to PostgreSQL: what it refuses fails alone, what passes is waited for, nothing is held on to."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from ledger import Ledger, result
from sqlalchemy import Connection, text
from waiting import wait_until

from medley.db import ends
from medley.rings import Ringer
from medley.spec.errors import ErrorCode, JobError
from medley.spec.ids import uuid7
from medley.spec.jobs import Details, JobState
from medley.spec.wire import JobKey
from medley_worker.shell.held import Held, HeldJobs, Phase
from medley_worker.shell.results import MAX_FLUSH, MAX_FLUSH_DETAILS, Results, _first_part
from medley_worker.shell.transactions import Transactions


@pytest.fixture
def transactions(module_database: Any) -> Iterator[Transactions]:
    made = Transactions(module_database.url("medley_work"), num_threads=1)
    yield made
    made._engine.dispose()


def test_what_cannot_be_stored_fails_alone_in_words_that_can(
    ledger: Ledger, transactions: Transactions, redis_url: str
) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    ledger.submit(tenant, [None] * 4)
    jobs = [(c.job, c.attempt) for c in ledger.claim(worker, [(tenant, 4)])]
    held, ringer = HeldJobs(), Ringer(redis_url)
    held.hold([Held(JobKey(*job), phase=Phase.ENDING) for job in jobs])
    results = Results(
        transactions, worker, held, ringer, pool=ledger.pool, low_water=1, on_fenced=lambda: pytest.fail("fenced")
    )
    threading.Thread(target=results.run, daemon=True).start()
    unspeakable = JobError(code=ErrorCode.ADAPTER_UNAVAILABLE, message="not text: \udc80")
    failed = result(*jobs[1], state=JobState.FAILED, text=None, num_tokens=0, error=unspeakable)
    unthinkable = msgspec.structs.replace(result(*jobs[3]), logprobs=(-0.5, math.nan))
    results.put([result(*jobs[0]), failed, result(*jobs[2]), unthinkable])
    wait_until(lambda: not len(held))
    assert [ledger.jobs()[job].state for job, _ in jobs] == ["succeeded", "failed", "succeeded", "failed"]
    ledger.check()
    ringer.close()


def test_a_transaction_that_was_frozen_too_long_is_begun_again(ledger: Ledger, transactions: Transactions) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    ledger.submit(tenant, [None])
    ((job, attempt),) = [(c.job, c.attempt) for c in ledger.claim(worker, [(tenant, 1)])]
    tries: list[None] = []

    def complete(conn: Connection) -> list[ends.Ended]:
        tries.append(None)
        if len(tries) == 1:
            conn.execute(text("SET idle_in_transaction_session_timeout = 1"))
            pid = conn.connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]
            wait_until(lambda: not _is_alive(ledger, pid))
        return ends.complete(conn, worker, [result(job, attempt)])

    assert [end.job for end in transactions.insist("storing", complete)] == [job]
    assert len(tries) == 2


def _is_alive(ledger: Ledger, pid: int) -> bool:
    """Each look has a transaction of its own: within one, PostgreSQL shows what the first look saw."""
    with ledger.working() as conn:
        found = conn.execute(text("SELECT 1 FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid})
        return found.one_or_none() is not None


def test_a_transaction_takes_so_many_results_and_fewer_of_large_ones() -> None:
    plain = [result(uuid7(), 1) for _ in range(MAX_FLUSH + 5)]
    assert _first_part(plain) == plain[:MAX_FLUSH]
    details = Details(top_token_ids=(1,) * (MAX_FLUSH_DETAILS // 2), top_logprobs=(-1.0,) * (MAX_FLUSH_DETAILS // 2))
    large = [msgspec.structs.replace(result(uuid7(), 1), details=details) for _ in range(3)]
    assert _first_part([plain[0], *large, plain[1]]) == [plain[0], *large[:2]]
    huge = msgspec.structs.replace(large[0], details=Details(prompt_top_logprobs=(-1.0,) * (2 * MAX_FLUSH_DETAILS)))
    assert _first_part([huge, huge]) == [huge]
