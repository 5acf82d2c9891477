"""The service with only the engine's forward replaced: submit over HTTP, and run, each beside its floor in bare SQL.

64-token prompts, 32 tokens out, 8 tenants, 300 adapters, batches of 1,000 to 100,000 jobs; fsync and row-level
security on. Rates are read from the rows' timestamps on the database's clock, after a warm-up.

The floors use the same tables, roles, indexes and row sizes in the same database, from as many connections as are
fastest: for submit the bare `INSERT ... SELECT unnest` of the jobs and their inputs; for run a bare claim of 256
(`FOR UPDATE SKIP LOCKED`) and a bare completion of 256 (update, result rows), each committed. Each floor is measured
before and after what stands beside it.
"""

from __future__ import annotations

import itertools
import secrets
import shutil
import string
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import httpx
import msgspec
from sqlalchemy import Engine, text

from benchmarks import record
from medley.client import Client
from medley.db.connections import make_engine, tenant_transaction, transaction
from medley.demo.skills import SKILLS
from medley.local.stack import LocalStack
from medley.spec.ids import uuid7

ASSETS = Path(__file__).resolve().parents[1] / "app" / "medley" / "demo" / "assets"
NUM_TENANTS, NUM_ADAPTERS, PROMPT_TOKENS, NEW_TOKENS = 8, 300, 64, 32
BATCH_SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
CHUNK = 5_000  # rows a bare INSERT statement, as the service's
CLAIM = 256


@dataclass(frozen=True)
class Tenant:
    name: str
    key: str
    adapters: tuple[str, ...]


def make_tenants(stack: LocalStack, folder: Path) -> list[Tenant]:
    """Eight tenants who share 300 adapters out among them (files of the demo's, under each tenant's names)."""
    tenants = []
    shares = [NUM_ADAPTERS // NUM_TENANTS + (i < NUM_ADAPTERS % NUM_TENANTS) for i in range(NUM_TENANTS)]
    for number, share in enumerate(shares):
        own = folder / f"tenant-{number}"
        for skill in SKILLS[:share]:
            shutil.copytree(ASSETS / "adapters" / skill.name, own / skill.name)
        key = stack.add_tenant(f"tenant-{number}")
        with Client(stack.url, key) as client:
            client.adapters.add_folder(own)
        tenants.append(Tenant(f"tenant-{number}", key, tuple(sorted(s.name for s in SKILLS[:share]))))
    return tenants


def body_of(tenant: Tenant, size: int) -> bytes:
    """One JSONL request of `size` jobs, their adapters taking turns."""
    letters = itertools.cycle(string.ascii_lowercase)
    prompt = "".join(itertools.islice(letters, PROMPT_TOKENS))
    adapters = itertools.cycle(tenant.adapters)
    rows = ({"prompt": prompt, "adapter": next(adapters), "custom_id": str(i)} for i in range(size))
    return b"\n".join(msgspec.json.encode(row) for row in rows)


def submit_for(url: str, tenants: list[Tenant], seconds: float) -> None:
    """Keeps two requests in flight until time is up; sizes and tenants take turns."""
    bodies = {size: [body_of(t, size) for t in tenants] for size in BATCH_SIZES}
    turns = itertools.cycle(itertools.product(range(len(tenants)), BATCH_SIZES))
    lock, deadline = threading.Lock(), time.monotonic() + seconds
    defaults = msgspec.json.encode({"max_tokens": NEW_TOKENS, "ignore_eos": True}).decode()

    def sender() -> None:
        with httpx.Client(base_url=url, timeout=120) as http:
            while time.monotonic() < deadline:
                with lock:
                    number, size = next(turns)
                headers = {
                    "Authorization": f"Bearer {tenants[number].key}",
                    "Content-Type": "application/x-ndjson",
                    "Idempotency-Key": uuid7().hex,
                }
                content = bodies[size][number]
                http.post(
                    "/v1/batches", params={"defaults": defaults}, content=content, headers=headers
                ).raise_for_status()

    threads = [threading.Thread(target=sender) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def rate(engine: Engine, column: str, since: Any, until: Any) -> float:
    """Jobs/s by their timestamps in [since, until]."""
    statement = text(
        f"SELECT count(*) / extract(epoch FROM CAST(:until AS timestamptz) - CAST(:since AS timestamptz))"
        f" FROM jobs WHERE {column} >= :since AND {column} < :until"
    )
    with transaction(engine) as conn:
        conn.execute(text("SET LOCAL statement_timeout = '10min'"))
        return float(conn.execute(statement, {"since": since, "until": until}).scalar_one())


def database_now(engine: Engine) -> Any:
    with transaction(engine) as conn:
        return conn.execute(text("SELECT clock_timestamp()")).scalar_one()


# The floors. Each runs in processes of its own, like the service.

_BARE_JOBS = """
INSERT INTO jobs (id, tenant_id, batch_id, pool, revision_id, priority, est_tokens)
SELECT r.id, %(tenant)s, %(batch)s, 'floor', r.revision, 1, 128
FROM unnest(%(ids)b::uuid[], %(revisions)b::uuid[]) AS r(id, revision)
"""
_BARE_INPUTS = """
INSERT INTO job_inputs (job_id, tenant_id, batch_id, custom_id, adapter, prompt, seed, sampling)
SELECT r.id, %(tenant)s, %(batch)s, r.custom_id, r.adapter, r.prompt, r.seed, r.sampling::jsonb
FROM unnest(%(ids)b::uuid[], %(custom_ids)b::text[], %(adapters)b::text[], %(prompts)b::text[], %(seeds)b::int8[],
    %(samplings)b::text[]) AS r(id, custom_id, adapter, prompt, seed, sampling)
"""


def bare_insert(url: str, tenant: UUID, seconds: float) -> float:
    """Jobs/s of one connection as `medley_api`."""
    engine = make_engine(url, name="floor", pool_size=1)
    revisions = [uuid7() for _ in range(NUM_ADAPTERS // NUM_TENANTS)] * (CHUNK // 30)
    columns = {
        "custom_ids": [str(i) for i in range(CHUNK)],
        "adapters": ["caesar-3"] * CHUNK,
        "prompts": ["abcdefghijklmnop" * (PROMPT_TOKENS // 16)] * CHUNK,
        "seeds": list(range(2**40, 2**40 + CHUNK)),
        "samplings": [f'{{"max_tokens":{NEW_TOKENS},"ignore_eos":true}}'] * CHUNK,
        "revisions": revisions[:CHUNK],
    }
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        shared = {"tenant": tenant, "batch": uuid7(), "ids": [uuid7() for _ in range(CHUNK)]}
        with tenant_transaction(engine, tenant) as conn:
            conn.exec_driver_sql(_BARE_JOBS, shared | columns)
            conn.exec_driver_sql(_BARE_INPUTS, shared | columns)
        count += CHUNK
    engine.dispose()
    return count / (time.perf_counter() - started)


# The limit is a literal: as a parameter the planner guesses it, and may read the whole table.
_BARE_CLAIM = f"""
UPDATE jobs j SET state = 'leased', worker_id = %(worker)s, attempt = attempt + 1, leased_at = clock_timestamp()
FROM (SELECT id FROM jobs WHERE pool = 'floor' AND state = 'queued' AND NOT is_held
    LIMIT {CLAIM} FOR UPDATE SKIP LOCKED) q
WHERE j.id = q.id RETURNING j.id, j.attempt, j.tenant_id, j.batch_id
"""
_BARE_COMPLETE = """
WITH ended AS (
    UPDATE jobs j SET state = 'succeeded', worker_id = NULL, finished_at = clock_timestamp()
    FROM unnest(%(ids)b::uuid[], %(attempts)b::int4[]) AS r(id, attempt)
    WHERE j.id = r.id AND j.attempt = r.attempt AND coalesce(j.worker_id = %(worker)s AND j.state = 'leased', false)
    RETURNING j.id, j.tenant_id, j.batch_id
)
INSERT INTO job_results (job_id, tenant_id, batch_id, seq, state, text, token_ids, logprobs, finish_reason,
    prompt_tokens, completion_tokens)
SELECT id, tenant_id, batch_id, %(first)s + row_number() OVER (), 'succeeded', %(text)s, %(token_ids)s::int4[],
    %(logprobs)s::float4[], 'length', 64, 32 FROM ended
"""


def bare_run(url: str, first: int, seconds: float) -> float:
    """Jobs/s of one connection as `medley_work`: claim 256, complete 256; results are numbered from `first`."""
    engine, worker = make_engine(url, name="floor", pool_size=1), uuid7()
    first += secrets.randbelow(2**58)  # a batch's numbers are unique, over all runs of the floor
    answer = {
        "text": "abcdefgh" * 4,
        "token_ids": "{" + ",".join(["101"] * NEW_TOKENS) + "}",
        "logprobs": "{" + ",".join(["-0.123456"] * NEW_TOKENS) + "}",
    }
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        with transaction(engine) as conn:
            # What fresh statistics would choose: the tables have grown too fast to have them.
            conn.exec_driver_sql("SET LOCAL enable_bitmapscan = off")
            conn.exec_driver_sql("SET LOCAL enable_seqscan = off")
            rows = conn.exec_driver_sql(_BARE_CLAIM, {"worker": worker}).all()
        if not rows:
            raise RuntimeError("the floor's queue ran empty: fill it for longer")
        with transaction(engine) as conn:
            matched = {"ids": [r.id for r in rows], "attempts": [r.attempt for r in rows]}
            conn.exec_driver_sql(_BARE_COMPLETE, matched | answer | {"worker": worker, "first": first + count})
        count += len(rows)
    engine.dispose()
    return count / (time.perf_counter() - started)


def floor(kind: Any, url: str, arguments: list[Any], seconds: float) -> tuple[float, int]:
    """The best of one and two connections, each a process: (jobs/s, connections)."""
    best = (0.0, 0)
    for processes in (1, 2):
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(kind, url, argument, seconds) for argument in arguments[:processes]]
            best = max(best, (sum(f.result() for f in futures), processes))
    return best


@click.command()
@click.option("--seconds", default=120.0, show_default=True, help="Measured, after the warm-up.")
@click.option("--warm-up", default=15.0, show_default=True)
@click.option("--floor-seconds", default=20.0, show_default=True)
def main(seconds: float, warm_up: float, floor_seconds: float) -> None:
    """Measure submit and run, and write the result."""
    with tempfile.TemporaryDirectory(prefix="medley-bench-") as scratch:
        data = Path(scratch) / "data"
        submit = measure_submit(data, Path(scratch), seconds, warm_up, floor_seconds)
        record.say(str(submit))
        run = measure_run(data, seconds, warm_up, floor_seconds)
    setting = {
        "tenants": NUM_TENANTS,
        "adapters": NUM_ADAPTERS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "seconds": seconds,
    }
    rows = [submit | setting, run | setting]
    path = record.write("service", f"python -m benchmarks.service {' '.join(sys.argv[1:])}".strip(), rows)
    for row in rows:
        record.say(f"{row['what']}: {row['jobs_s']:,} jobs/s, floor {row['floor_jobs_s']:,}, ratio {row['ratio']}")
    record.say(f"wrote {path}")


def measure_submit(data: Path, scratch: Path, seconds: float, warm_up: float, floor_seconds: float) -> dict[str, Any]:
    with LocalStack(data, model=ASSETS / "model", workers=0) as stack:
        work = make_engine(stack.database_url("medley_work"), name="bench", pool_size=2)
        tenants = make_tenants(stack, scratch / "adapters")
        submit_for(stack.url, tenants, warm_up)
        with transaction(work) as conn:
            ids = list(conn.execute(text("SELECT id FROM tenants ORDER BY id")).scalars())
        before = floor(bare_insert, stack.database_url("medley_api"), ids, floor_seconds)
        since = database_now(work)
        submit_for(stack.url, tenants, seconds)
        # Whole batches only: the last one may end after its time.
        jobs_s = rate(work, "created_at", since, database_now(work))
        after = floor(bare_insert, stack.database_url("medley_api"), ids, floor_seconds)
        work.dispose()
    return _row("submit over HTTP", jobs_s, before, after) | {"batch_sizes": BATCH_SIZES}


def measure_run(data: Path, seconds: float, warm_up: float, floor_seconds: float) -> dict[str, Any]:
    before = measure_bare_run(data, 2**60, floor_seconds)
    environ = {"MEDLEY_FORWARD": "null", "MEDLEY_MAX_NUM_SEQS": "256"}
    with LocalStack(data, model=ASSETS / "model", workers=1, environ=environ) as stack:
        work = make_engine(stack.database_url("medley_work"), name="bench", pool_size=2)
        time.sleep(warm_up)
        since = database_now(work)
        time.sleep(seconds)
        until = database_now(work)
        jobs_s = rate(work, "finished_at", since, until)
        work.dispose()
    return _row("run", jobs_s, before, measure_bare_run(data, 2**61, floor_seconds))


def measure_bare_run(data: Path, first: int, seconds: float) -> tuple[float, int]:
    with LocalStack(data, model=ASSETS / "model", workers=0) as stack:
        return floor(bare_run, stack.database_url("medley_work"), [first, first + 2**59], seconds)


def _row(what: str, jobs_s: float, before: tuple[float, int], after: tuple[float, int]) -> dict[str, Any]:
    """A result beside its floor: the mean of before and after, since a shared machine's speed drifts."""
    bare = (before[0] + after[0]) / 2
    return {
        "what": what,
        "jobs_s": round(jobs_s),
        "floor_jobs_s": round(bare),
        "floor_before_after_jobs_s": [round(before[0]), round(after[0])],
        "floor_connections": [before[1], after[1]],
        "ratio": round(jobs_s / bare, 3),
    }


if __name__ == "__main__":
    main()
