"""The HTTP interface: a file of a million lines, results read back, reads under load, and 2,000 clients that wait.

- submit: one NDJSON request of 1,000,000 lines over the bare `INSERT ... SELECT unnest` of the same rows by one
  connection (a request is one transaction), and what the API's process takes in memory for it.
- read: the results of a batch by pages of the cursor, over a bare SELECT of the same columns by pages.
- reads under load: p99 of `GET /v1/jobs/{id}` at half the rate that the service reaches, over its idle p99, of one
  client that asks again at once. Beside it the p99 of requests that come now and then, for which processes and
  processors must wake, and the same of an endpoint that does nothing.
- waiting: 2,000 clients wait for a job each, `GET ...?wait=60`, before a worker starts; how long after the result was
  committed each has its answer.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self
from uuid import UUID

import click
import httpx
import msgspec
from sqlalchemy import text

from benchmarks import record
from benchmarks.service import ASSETS, bare_insert
from medley.client import Client
from medley.db.connections import make_engine, tenant_transaction, transaction
from medley.garbage import collect_rarely
from medley.local.child import Child, Command
from medley.local.stack import LocalStack
from medley.spec.ids import uuid7

PROMPT = "abcdefghijklmnop" * 4
DEFAULTS = '{"max_tokens":32,"ignore_eos":true}'
BLOCK_LINES = 10_000
PAGE = 10_000
ROUNDS, WARM_S = 4, 1.0  # by turns; a rate begins with its connections made
SPARSE_S = 50.0  # requests/s that come now and then
IDLE_S = 3.0  # a connection that is idle for longer is not used again: the server ends it after 5
NDJSON = {"Content-Type": "application/x-ndjson"}
NULL_ENGINE = {"MEDLEY_FORWARD": "null", "MEDLEY_MAX_NUM_SEQS": "256"}
UNLIMITED = {"MEDLEY_QUOTA_REQUESTS_PER_S": "1000000"}  # of one tenant

Row = dict[str, Any]


@dataclass(frozen=True)
class Access:
    """One tenant's way in."""

    url: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def submit(self, num_lines: int) -> str:
        """One batch of so many jobs, sent as it is made; its id."""

        def body() -> Iterator[bytes]:
            for start in range(0, num_lines, BLOCK_LINES):
                rows = range(start, min(start + BLOCK_LINES, num_lines))
                yield b"".join(msgspec.json.encode({"prompt": PROMPT, "custom_id": str(i)}) + b"\n" for i in rows)

        headers = self.headers | NDJSON | {"Idempotency-Key": uuid7().hex}
        url = f"{self.url}/v1/batches"
        answer = httpx.post(url, params={"defaults": DEFAULTS}, content=body(), headers=headers, timeout=600)
        return str(answer.raise_for_status().json()["id"])


def resident_mib(pid: int) -> dict[str, float]:
    """Memory of a process now, and the most that it ever had."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")}


def measure_submit(stack: LocalStack, access: Access, num_lines: int, floor_seconds: float) -> Row:
    pid = stack.pid("api")
    access.submit(20_000)  # warms up
    before = resident_mib(pid)["VmRSS"]
    started = time.perf_counter()
    access.submit(num_lines)
    jobs_s = num_lines / (time.perf_counter() - started)
    grown = resident_mib(pid)["VmHWM"] - before
    work = make_engine(stack.database_url("medley_work"), name="bench", pool_size=1)
    with transaction(work) as conn:
        tenant = conn.execute(text("SELECT id FROM tenants LIMIT 1")).scalar_one()
    work.dispose()
    bare = bare_insert(stack.database_url("medley_api"), tenant, floor_seconds)
    return _row("submit", jobs_s, bare) | {"lines": num_lines, "memory_grown_mib": round(grown, 1)}


def measure_read(stack: LocalStack, access: Access, num_jobs: int) -> Row:
    with Client(access.url, access.key) as client:
        batch = access.submit(num_jobs)
        client.batch(batch).wait(timeout=600)
    rates = {}
    for include in ("", "tokens"):
        started, num_rows, after = time.perf_counter(), 0, "0"
        with httpx.Client(headers=access.headers | {"Accept": "application/x-ndjson"}, timeout=120) as http:
            while True:
                query = {"after": after, "limit": str(PAGE), "include": include}
                page = http.get(f"{access.url}/v1/batches/{batch}/results", params=query).raise_for_status()
                num_rows += page.content.count(b"\n")
                after = page.headers["X-Medley-Next"]
                if page.headers["X-Medley-Finished"] == "true":
                    break
        assert num_rows == num_jobs, f"{num_rows} results of {num_jobs}"
        rates[include] = num_rows / (time.perf_counter() - started)
    bare = bare_select(stack, UUID(hex=batch.partition("_")[2]))
    return _row("read", rates["tokens"], bare) | {"results": num_jobs, "without_tokens_s": round(rates[""])}


_BARE_SELECT = """
SELECT r.seq, r.job_id, r.state, i.custom_id, i.adapter, i.prompt_idx, i.seed, r.text, r.token_ids, r.logprobs,
    r.finish_reason, r.prompt_tokens, r.completion_tokens, r.error_code, r.error_message, j.finished_at
FROM job_results r JOIN job_inputs i ON i.job_id = r.job_id JOIN jobs j ON j.id = r.job_id
WHERE r.batch_id = %(batch)s AND r.seq > %(after)s ORDER BY r.seq LIMIT %(limit)s
"""


def bare_select(stack: LocalStack, batch: UUID) -> float:
    """Results/s of one connection as `medley_api`."""
    engine = make_engine(stack.database_url("medley_api"), name="floor", pool_size=1)
    work = make_engine(stack.database_url("medley_work"), name="floor", pool_size=1)
    with transaction(work) as conn:
        find = text("SELECT tenant_id FROM batches WHERE id = :id")
        tenant = conn.execute(find, {"id": batch}).scalar_one()
    started, num_rows, after = time.perf_counter(), 0, 0
    while True:
        with tenant_transaction(engine, tenant) as conn:
            rows = conn.exec_driver_sql(_BARE_SELECT, {"batch": batch, "after": after, "limit": PAGE}).all()
        if not rows:
            break
        num_rows, after = num_rows + len(rows), rows[-1].seq
    rate = num_rows / (time.perf_counter() - started)
    engine.dispose()
    work.dispose()
    return rate


def measure_gets(access: Access, job_ids: list[str], seconds: float) -> Row:
    return asyncio.run(_measure_gets(access, job_ids, seconds))


async def _measure_gets(access: Access, job_ids: list[str], seconds: float) -> Row:
    async with Connections(access) as connections:

        async def get_job() -> float:
            return await _timed(connections, f"/v1/jobs/{random.choice(job_ids)}")

        async def get_nothing() -> float:
            return await _timed(connections, "/livez")

        await _closed_loop(get_job, 2, 1.0)
        rate = len(await _closed_loop(get_job, 16, seconds)) / seconds
        idle, sparse, half = await _in_turns(get_job, rate / 2, seconds)
        # The same from an endpoint that does nothing: what sender and processors make of such a load by themselves.
        floor_idle, floor_sparse, floor_half = await _in_turns(get_nothing, rate / 2, seconds / 2)
    p99_idle, p99_half = _p99(idle), _p99(half)
    return {
        "what": "GET /v1/jobs/{id}",
        "most_s": round(rate),
        "idle_p50_ms": round(statistics.median(idle) * 1e3, 2),
        "idle_p99_ms": round(p99_idle * 1e3, 2),
        "sparse_p50_ms": round(statistics.median(sparse) * 1e3, 2),
        "sparse_p99_ms": round(_p99(sparse) * 1e3, 2),
        "half_p50_ms": round(statistics.median(half) * 1e3, 2),
        "half_p99_ms": round(p99_half * 1e3, 2),
        "ratio": round(p99_half / p99_idle, 2),
        "ratio_of_sparse": round(p99_half / _p99(sparse), 2),
        "floor_idle_p99_ms": round(_p99(floor_idle) * 1e3, 2),
        "floor_sparse_p99_ms": round(_p99(floor_sparse) * 1e3, 2),
        "floor_half_p99_ms": round(_p99(floor_half) * 1e3, 2),
        "floor_ratio": round(_p99(floor_half) / _p99(floor_idle), 2),
    }


async def _in_turns(
    get: Callable[[], Awaitable[float]], rate: float, seconds: float
) -> tuple[list[float], list[float], list[float]]:
    """Back to back, now and then, and at a rate: so many seconds of each, by turns, as the machine drifts."""
    idle, sparse, at_rate = [], [], []
    for _ in range(ROUNDS):
        idle += await _closed_loop(get, 1, seconds / ROUNDS)
        sparse += await _open_loop(get, SPARSE_S, seconds / ROUNDS)
        await _open_loop(get, rate, WARM_S)
        at_rate += await _open_loop(get, rate, seconds / ROUNDS)
    return idle, sparse, at_rate


async def _timed(connections: Connections, path: str) -> float:
    started = time.perf_counter()
    await connections.get(path)
    return time.perf_counter() - started


class Connections:
    """Kept-alive connections of HTTP/1.1, as many as are in use at once. So light that it measures the service."""

    def __init__(self, access: Access) -> None:
        self._at = httpx.URL(access.url)
        lines = (f"{name}: {value}\r\n" for name, value in (access.headers | {"Host": self._at.host}).items())
        self._head = "".join(lines)
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []  # since when; newest last

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for _since, _reader, writer in self._idle:
            writer.close()

    async def get(self, path: str) -> bytes:
        """The body of a 200."""
        now = time.monotonic()
        if self._idle and now - self._idle[-1][0] < IDLE_S:
            _, reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection(self._at.host, self._at.port)
        while self._idle and now - self._idle[0][0] >= IDLE_S:
            self._idle.pop(0)[2].close()
        writer.write(f"GET {path} HTTP/1.1\r\n{self._head}\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        status, _, fields = head.decode().partition("\r\n")
        if " 200 " not in status:
            raise RuntimeError(f"{path}: {status}")
        length = next(
            int(v) for n, _, v in (f.partition(":") for f in fields.split("\r\n")) if n.lower() == "content-length"
        )
        body = await reader.readexactly(length)
        self._idle.append((time.monotonic(), reader, writer))
        return body


async def _closed_loop(get: Callable[[], Awaitable[float]], num_clients: int, seconds: float) -> list[float]:
    """Each client asks again when it has its answer."""
    deadline, taken = time.perf_counter() + seconds, []

    async def client() -> None:
        while time.perf_counter() < deadline:
            taken.append(await get())

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return taken


async def _open_loop(get: Callable[[], Awaitable[float]], rate: float, seconds: float) -> list[float]:
    """Requests come as a Poisson process, whatever has been answered."""
    rng, started, due = random.Random(0), time.perf_counter(), 0.0
    tasks: list[asyncio.Task[float]] = []
    while due < seconds:
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        tasks.append(asyncio.create_task(get()))  # type: ignore[arg-type]
        due += rng.expovariate(rate)
    return list(await asyncio.gather(*tasks))


def _p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


def measure_waiting(data: Path, stack: LocalStack, access: Access, num_clients: int) -> tuple[Row, list[str]]:
    """Jobs are made, their clients wait, then a worker starts. Returns the ids of the jobs too."""
    with Client(access.url, access.key) as client:
        jobs = [client.submit(PROMPT, max_tokens=32, ignore_eos=True).id for _ in range(num_clients)]
    delays = asyncio.run(_wait_for_all(stack, data, access, jobs))
    row = {
        "what": "waiting clients",
        "clients": num_clients,
        "answered": len(delays),
        "median_ms": round(statistics.median(delays) * 1e3, 1),
        "p99_ms": round(_p99(delays) * 1e3, 1),
        "most_ms": round(max(delays) * 1e3, 1),
    }
    return row, jobs


async def _wait_for_all(stack: LocalStack, data: Path, access: Access, jobs: list[str]) -> list[float]:
    async with Connections(access) as connections:

        async def wait(job: str) -> float:
            answer = msgspec.json.decode(await connections.get(f"/v1/jobs/{job}?wait=60"))
            assert answer["finished_at"] is not None, f"{job} was not done: {answer['state']}"
            return time.time() - datetime.fromisoformat(answer["finished_at"]).timestamp()

        waits = [asyncio.create_task(wait(job)) for job in jobs]
        await asyncio.sleep(5)  # all are connected and wait
        worker = await asyncio.to_thread(_Worker, stack, data)
        try:
            return list(await asyncio.gather(*waits))
        finally:
            worker.stop()


class _Worker:
    """A worker beside a stack that has none."""

    def __init__(self, stack: LocalStack, data: Path) -> None:
        env = os.environ | NULL_ENGINE
        env |= {
            "MEDLEY_DATABASE_URL": stack.database_url("medley_work"),
            "MEDLEY_REDIS_URL": stack.redis_url,
            "MEDLEY_STORE_URL": stack.store_url,
            "MEDLEY_MODEL": str(ASSETS / "model"),
        }
        self._log = (data / "worker.log").open("wb")
        argv = (sys.executable, "-m", "medley", "worker")
        self._child = Child(Command(name="worker", argv=argv, env=env), output=self._log.fileno())

    def stop(self) -> None:
        self._child.stop(20)
        self._log.close()


def _row(what: str, rate: float, bare: float) -> Row:
    return {"what": what, "rows_s": round(rate), "floor_rows_s": round(bare), "ratio": round(rate / bare, 3)}


@click.command()
@click.option("--lines", default=1_000_000, show_default=True, help="Of the file that is submitted.")
@click.option("--results", default=200_000, show_default=True, help="That are read back.")
@click.option("--clients", default=2_000, show_default=True, help="That wait at once.")
@click.option("--seconds", default=20.0, show_default=True, help="Of each measurement by time.")
def main(lines: int, results: int, clients: int, seconds: float) -> None:
    """Measure the HTTP interface, and write the result."""
    collect_rarely()  # what this process holds of each request is not to show as the service's pauses
    with tempfile.TemporaryDirectory(prefix="medley-bench-") as scratch:
        rows = _without_worker(Path(scratch) / "idle", lines, clients, seconds)
        rows += _with_worker(Path(scratch) / "busy", results)
    path = record.write("api", f"python -m benchmarks.api {' '.join(sys.argv[1:])}".strip(), rows)
    record.say(f"wrote {path}")


def _without_worker(data: Path, lines: int, clients: int, seconds: float) -> list[Row]:
    with LocalStack(data, model=ASSETS / "model", workers=0, environ=UNLIMITED) as stack:
        access = Access(stack.url, stack.add_tenant("acme"))
        waiting, jobs = measure_waiting(data, stack, access, clients)
        record.say(str(waiting))
        gets = measure_gets(access, jobs, seconds)
        record.say(str(gets))
        submit = measure_submit(stack, access, lines, seconds)
        record.say(str(submit))
    return [submit, gets, waiting]


def _with_worker(data: Path, results: int) -> list[Row]:
    with LocalStack(data, model=ASSETS / "model", workers=1, environ=NULL_ENGINE | UNLIMITED) as stack:
        read = measure_read(stack, Access(stack.url, stack.add_tenant("acme")), results)
        record.say(str(read))
    return [read]


if __name__ == "__main__":
    main()
