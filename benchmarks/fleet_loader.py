"""The fleet of the scale benchmark, as a process: a thousand workers' renewals and completions, and new jobs.

`python -m benchmarks.fleet_loader`, with its orders as one line of JSON on standard input; it ends when that closes.
The statements are the workers' own (`workers.renew`, `ends.complete`); only what an engine would compute is made up.
"""

from __future__ import annotations

import sys
import threading
import time
from uuid import UUID

import msgspec

from benchmarks.fleet_rows import (
    LEASE_S,
    MAX_NUM_SEQS,
    NUM_TILES,
    Lane,
    Pool,
    enqueue,
)
from medley.db import ends, inputs, workers
from medley.db.connections import make_engine, plan_each, transaction
from medley.dispatcher.bookkeeper import Bookkeeper
from medley.spec.jobs import FinishReason, JobState

RENEW_EVERY_S = 10.0
REFILL_AT_LEAST = 500
TOKENS = tuple(range(32))
LOGPROBS = (-0.1,) * 32


class Orders(msgspec.Struct):
    url: str
    pool: str
    lanes: list[Lane]
    workers: list[UUID]
    keep_queued: int
    complete_jobs_s: float


def main() -> None:
    orders = msgspec.json.decode(sys.stdin.readline(), type=Orders)
    pool = Pool(orders.pool, orders.lanes, orders.workers)
    stop = threading.Event()
    loops = (
        lambda: _renew(orders, pool, stop),
        lambda: _complete(orders, pool, stop),
        lambda: _refill(orders, pool, stop),
    )
    threads = [threading.Thread(target=loop, daemon=True) for loop in loops]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()


def _renew(orders: Orders, pool: Pool, stop: threading.Event) -> None:
    """Each worker's lease in its turn, evenly spread."""
    engine = make_engine(orders.url, name="renewals", pool_size=1)
    room = workers.Room(MAX_NUM_SEQS, num_pages=100_000, page_size=16, num_tiles=NUM_TILES)
    began, steps = time.monotonic(), 0.0
    is_first = True
    while not stop.is_set():
        for number, worker in enumerate(pool.workers):
            steps = (time.monotonic() - began) * 100
            stats = {
                "steps": int(steps),
                "step_s": steps / 100,
                "rows": int(steps) * 64,
                "adapters": int(steps) * 8,
                "prompt_tokens": int(steps) * 100,
                "num_running": 64,
                "num_pages": 100_000,
                "pages_used": 1_000,
            }
            resident = [pool.lanes[(number * 7 + k) % len(pool.lanes)].revision for k in range(8)]
            with transaction(engine) as conn:
                state = workers.WorkerState.ACTIVE
                workers.renew(conn, worker, lease_s=LEASE_S, state=state, room=room, resident=resident, stats=stats)
            if not is_first and stop.wait(RENEW_EVERY_S / len(pool.workers)):
                break
        is_first = False
    engine.dispose()


def _complete(orders: Orders, pool: Pool, stop: threading.Event) -> None:
    """Each worker in turn ends what it holds, at no more than the ordered rate on the whole."""
    engine = make_engine(orders.url, name="completions", pool_size=1)
    due_at = time.monotonic()
    while not stop.is_set():
        num_ended = 0
        for worker in pool.workers:
            with transaction(engine) as conn:
                held = inputs.assigned(conn, worker)[:MAX_NUM_SEQS]
            if held:
                with transaction(engine) as conn:
                    num_ended += len(ends.complete(conn, worker, [_result(job, attempt) for job, attempt in held]))
                due_at = max(due_at, time.monotonic() - 1.0) + len(held) / orders.complete_jobs_s
            if stop.wait(max(0.0, due_at - time.monotonic())):
                break
        if not num_ended:
            stop.wait(0.05)
    engine.dispose()


def _result(job: UUID, attempt: int) -> ends.Result:
    return ends.Result(
        job=job,
        attempt=attempt,
        state=JobState.SUCCEEDED,
        text="a result of thirty-two characters",
        token_ids=TOKENS,
        logprobs=LOGPROBS,
        finish_reason=FinishReason.LENGTH,
        prompt_tokens=64,
    )


def _refill(orders: Orders, pool: Pool, stop: threading.Event) -> None:
    """Keeps as many jobs in the queue; what it holds is followed as the leader does, at no cost to speak of."""
    engine = make_engine(orders.url, name="submits", pool_size=1)
    at, keeper = 0, Bookkeeper(pool.name)
    while not stop.wait(0.05):
        with transaction(engine) as conn:
            plan_each(conn)
            keeper.look(conn, time.monotonic())
        missing = orders.keep_queued - sum(waits.num_queued for waits in keeper.books.waiting())
        if missing < REFILL_AT_LEAST:
            continue
        num_lanes = min(len(pool.lanes), missing)
        lanes = [pool.lanes[(at + k) % len(pool.lanes)] for k in range(num_lanes)]
        at += num_lanes
        with transaction(engine) as conn:
            enqueue(conn, pool, lanes, max(1, missing // num_lanes))
    engine.dispose()


if __name__ == "__main__":
    main()
