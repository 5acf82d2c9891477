"""The rest of a service in a thread: expands sweeps as the task worker does, and completes jobs as a worker does."""

from __future__ import annotations

from typing import Any

from api_server import Api
from background import Background
from sqlalchemy import text

from medley.db.sweeps import read_unexpanded
from medley.spec.ids import BATCH, public_id
from medley.tasks.expand import Expander


class Working(Background):
    """Within the block every job that is queued ends soon, as `fields` say (text, state, error, ...)."""

    def __init__(self, api: Api, **fields: Any) -> None:
        super().__init__(self._work)
        self._api = api
        self._fields = fields

    def _work(self) -> None:
        expand(self._api)
        self._finish_queued()

    def _finish_queued(self) -> None:
        statement = text("SELECT DISTINCT batch_id FROM jobs WHERE pool = :pool AND state = 'queued' AND NOT is_held")
        with self._api.ledger.working() as conn:
            waiting = list(conn.execute(statement, {"pool": self._api.ledger.pool}).scalars())
        for batch in waiting:
            self._api.finish(public_id(BATCH, batch), **self._fields)


def expand(api: Api) -> None:
    """Turns the cells of every sweep into jobs."""
    expander = Expander(api.ledger.work, api.ringer, api.ledger.pool)
    with api.ledger.working() as conn:
        waiting = read_unexpanded(conn)
    for sweep in waiting:
        expander.expand(sweep)
