"""A stack of real processes as a scenario sees it, its load, and the audit that every scenario ends with."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.recount import audit
from sqlalchemy import Engine, text

import medley
from medley.client import Batch, Client
from medley.db.connections import transaction
from medley.demo.skills import SKILLS
from medley.local.stack import LocalStack

ASSETS = Path(medley.__file__).parent / "demo" / "assets"
LEASE_S, TICK_S = 2.0, 0.5
NOISE_S = 4.0  # what two loaded cores may add to any bound


@dataclass
class Service:
    """A running stack with a tenant, its client, and a look behind the scenes."""

    stack: LocalStack
    client: Client
    engine: Engine
    while_waiting: Callable[[], None] = lambda: None

    def scalar(self, statement: str, **parameters: object) -> int:
        with transaction(self.engine) as conn:
            return int(conn.execute(text(statement), parameters).scalar_one())

    def wait_until(self, what: str, holds: Callable[[], bool], timeout_s: float = 60.0) -> float:
        """Polls until `holds`; returns the seconds it took."""
        started = time.monotonic()
        while not holds():
            assert time.monotonic() - started < timeout_s, f"{what}: not within {timeout_s} s\n{self.tail()}"
            self.while_waiting()
            time.sleep(0.02)
        return time.monotonic() - started

    def wait_progress(self, batch: Batch, share: float, timeout_s: float = 120) -> None:
        """Until this share of the batch has ended."""
        self.wait_until(
            f"{share:.0%} of {batch.id}", lambda: (c := batch.refresh().counts).ended >= share * c.total, timeout_s
        )

    def tail(self) -> str:
        return self.stack.log_path.read_text()[-6000:]


def sweep_jobs(seed: int, num_jobs: int) -> list[dict[str, object]]:
    """Jobs of mixed adapters and lengths, the base among them."""
    rng = random.Random(seed)
    adapters = [*(skill.name for skill in SKILLS[:6]), None]
    return [
        {
            "prompt": "".join(rng.choices("abcdefgh", k=rng.randint(3, 20))) + "=",
            "custom_id": str(i),
            "max_tokens": rng.randint(8, 48),
            "ignore_eos": True,
            "temperature": rng.choice([0.0, 1.0]),
            "seed": i,
        }
        | ({"adapter": adapter} if (adapter := rng.choice(adapters)) else {})
        for i in range(num_jobs)
    ]


def long_jobs(seed: int, num_jobs: int) -> list[dict[str, object]]:
    """Jobs that run for a while and whose tokens depend on all of their tokens before."""
    draw = random.Random(seed)
    return [job | {"max_tokens": draw.randint(150, 220)} for job in sweep_jobs(seed, num_jobs)]


def holder(service: Service) -> int:
    """The process id of the worker that holds most jobs, once one holds any."""
    statement = (
        "SELECT coalesce((SELECT w.pid FROM workers w JOIN jobs j ON j.worker_id = w.id"
        " WHERE j.state = 'leased' AND w.state <> 'gone' AND w.lease_until > clock_timestamp()"
        " GROUP BY w.pid ORDER BY count(*) DESC LIMIT 1), 0)"
    )
    found: list[int] = []
    service.wait_until("a worker that holds jobs", lambda: found.append(service.scalar(statement)) or found[-1] > 0)
    return found[-1]


def finish(service: Service, *batches: Batch, timeout_s: float = 120) -> None:
    """Waits for the batches, reads each result once by the cursor, and audits."""
    for batch in batches:
        service.wait_progress(batch, 1.0, timeout_s)
        results = list(batch.results(timeout=timeout_s))
        assert [r.seq for r in results] == sorted({r.seq for r in results})
        counts = batch.refresh().counts
        assert len({r.id for r in results}) == len(results) == counts.total + counts.retried
    with transaction(service.engine) as conn:
        audit(conn)
