"""A ledger with dispatchers whose clock stands in the test's hand."""

from __future__ import annotations

import base64
import json
from typing import Any
from uuid import UUID

import redis
from ledger import Ledger
from sqlalchemy import text

from medley.celery_app import worker_queue
from medley.config import Settings
from medley.db.connections import make_engine
from medley.dispatcher.loop import Dispatcher
from medley.dispatcher.plans import Rules
from medley.rings import Ringer


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
