"""Log-probabilities on their way through PostgreSQL: none is lost on it, and what is none is refused."""

from __future__ import annotations

import math

import msgspec
import pytest
from ledger import Ledger, result
from sqlalchemy import text

from medley.db import queue
from medley.db.ends import LOWEST_LOGPROB, finite
from medley.db.inputs import fetch_inputs
from medley.spec.jobs import Checkpoint


def test_minus_infinity_is_stored_as_the_lowest_float32(ledger: Ledger) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    ledger.submit(tenant, [None])
    ((job, attempt),) = [(c.job, c.attempt) for c in ledger.claim(worker, [(tenant, 1)])]
    ledger.store(worker, [msgspec.structs.replace(result(job, attempt), logprobs=(-math.inf, -0.5))])
    with ledger.working() as conn:
        stored = conn.execute(text("SELECT logprobs FROM job_results WHERE job_id = :id"), {"id": job}).scalar_one()
    assert stored == [pytest.approx(LOWEST_LOGPROB), -0.5]


def test_a_checkpoint_that_holds_minus_infinity_can_be_read_again(ledger: Ledger) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker()
    ledger.submit(tenant, [None])
    ((job, attempt),) = [(c.job, c.attempt) for c in ledger.claim(worker, [(tenant, 1)])]
    kept = Checkpoint(token_ids=(1, 2), logprobs=(-0.5, -math.inf))
    with ledger.working() as conn:
        queue.release(conn, worker, [queue.Release(job, attempt, kept)])
    ledger.claim(worker, [(tenant, 1)])
    with ledger.working() as conn:
        (found,) = fetch_inputs(conn, worker, [job])
    assert found.checkpoint is not None
    assert found.checkpoint.logprobs == (-0.5, pytest.approx(LOWEST_LOGPROB))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_log_probability_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="logprobs: got"):
        finite((-0.5, value, -math.inf))
