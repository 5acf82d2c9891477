"""The renewal of a worker's lease: what a lost one means, and what it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from sqlalchemy import Connection

from medley.db.workers import LeaseLost
from medley.spec.ids import uuid7
from medley_worker.shell.lease import Lease
from medley_worker.shell.report import Report
from medley_worker.shell.transactions import Transactions


class _Gone:
    """A database in which the worker's row is gone."""

    def run(self, _work: Callable[[Connection], Any]) -> Any:
        raise LeaseLost


def _run(*, gives_up: bool) -> list[str]:
    lost: list[str] = []
    lease = Lease(cast(Transactions, _Gone()), uuid7(), Report(4), lease_s=8, health_file=None)
    if gives_up:
        lease.give_up()
    lease.run(lambda _: None, lambda: lost.append("lost"))
    return lost


def test_a_lease_that_lapsed_is_reported_lost() -> None:
    assert _run(gives_up=False) == ["lost"]


def test_a_lease_that_was_given_up_is_not() -> None:
    """A renewal may come between a worker's farewell and its end, which is then an orderly one."""
    assert _run(gives_up=True) == []
