"""The dispatcher at scale: 1,000 workers, 1,000 tenants, 1,000,000 queued jobs, beside bare claims in the same run.

PostgreSQL (fsync on), Redis and the dispatcher's process are real; workers are rows that a loader process renews and
whose jobs it ends. The same is measured with 10,000 jobs queued, and both again while another session holds a snapshot
open over as many claims and ends as ten minutes bring: dead rows that nobody may remove (`--snapshot-s 600` waits
the ten minutes out, with both fleets running). Jobs a core-second are jobs over the processor time of the dispatcher's
process and of its PostgreSQL session together, from whatever else the machine does apart.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
from sqlalchemy import Engine, text

from benchmarks import record
from benchmarks.fleet_loader import Orders
from benchmarks.fleet_rows import (
    MAX_NUM_SEQS,
    Pool,
    age,
    bare_claims,
    cpu_s,
    end_leased,
    fill,
    make_pool,
    make_tenants,
    num_leased,
    num_living,
    num_queued,
    revive,
)
from medley.db.connections import allow_minutes, make_engine, transaction
from medley.db.migrate import upgrade
from medley.local.datadir import DataDir
from medley.local.embedded import EmbeddedServers

NUM_BARE_CLAIMS, JOBS_A_BARE_CLAIM = 100, 1_000


@contextmanager
def loader(url: str, pool: Pool, keep_queued: int, complete_jobs_s: float) -> Iterator[None]:
    orders = Orders(url, pool.name, pool.lanes, pool.workers, keep_queued, complete_jobs_s)
    argv = [sys.executable, "-m", "benchmarks.fleet_loader"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(orders) + b"\n")
        process.stdin.flush()
        try:
            yield
        finally:
            process.stdin.close()
            process.wait(30)


@contextmanager
def dispatcher(servers: EmbeddedServers, pool: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environ = os.environ | {
        "MEDLEY_DATABASE_URL": servers.database_url("medley_work"),
        "MEDLEY_REDIS_URL": servers.redis_url,
        "MEDLEY_STORE_URL": "file:///nowhere",
        "MEDLEY_POOL": pool,
    }
    with (
        log.open("ab") as output,
        subprocess.Popen(
            [sys.executable, "-m", "medley", "dispatcher"], env=environ, stdout=output, stderr=output
        ) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def memory_mib(pid: int) -> tuple[int, int]:
    """(now, the most so far) of a process's resident memory."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) >> 10, int(fields["VmHWM"].split()[0]) >> 10


def measure(
    servers: EmbeddedServers, work: Engine, pool: Pool, *, keep_queued: int, seconds: float, warm_up: float, rate: float
) -> dict[str, Any]:
    """What the dispatcher assigns on its own, on a fleet that has room, while it works and ends."""
    url = servers.database_url("medley_work")
    revive(work, pool.name)
    with loader(url, pool, keep_queued, rate), dispatcher(servers, pool.name, servers.data.path / "d.log") as process:
        _await_claims(work, pool.name)
        time.sleep(warm_up)
        backend = _backend(work)
        since, own, server = _now(work), cpu_s(process.pid), cpu_s(backend)
        time.sleep(seconds)
        until = _now(work)
        own, server = cpu_s(process.pid) - own, cpu_s(backend) - server
        with transaction(work) as conn:
            queued = num_queued(conn, pool.name)
        rss, peak = memory_mib(process.pid)
    _check_living(work, pool)
    with transaction(work) as conn:
        allow_minutes(conn)
        held = num_leased(conn, pool.name)
        window = {"pool": pool.name, "since": since, "until": until}
        counted = text("SELECT count(*) FROM jobs WHERE pool = :pool AND leased_at >= :since AND leased_at < :until")
        jobs = int(conn.execute(counted, window).scalar_one())
        transactions = text(
            "SELECT count(DISTINCT xmin::text) FROM jobs"
            " WHERE pool = :pool AND state = 'leased' AND leased_at >= :since"
        )
        jobs_a_claim = jobs / max(1, int(conn.execute(transactions, window).scalar_one()))
    end_leased(work, pool.name)
    if held > len(pool.workers) * MAX_NUM_SEQS:
        raise RuntimeError(f"the fleet was full, with {held} jobs: what follows waits for it; take fewer --seconds")
    elapsed = (until - since).total_seconds()
    return {
        "queued": queued,
        "jobs_s": round(jobs / elapsed),
        "jobs_core_s": round(jobs / (own + server)),
        "cores": round((own + server) / elapsed, 2),
        "postgres_share": round(server / (own + server), 2),
        "jobs_a_claim": round(jobs_a_claim),
        "rss_mib": rss,
        "peak_rss_mib": peak,
    }


def run_on(servers: EmbeddedServers, work: Engine, pools: list[Pool], keep: dict[str, int], o: dict[str, Any]) -> None:
    """All of `pools` at work for as long as the snapshot is to age, each with a fleet and a dispatcher of its own."""
    url = servers.database_url("medley_work")
    since = _now(work)
    with ExitStack() as running:
        for pool in pools:
            revive(work, pool.name)
            running.enter_context(loader(url, pool, keep[pool.name], o["complete_jobs_s"]))
            running.enter_context(dispatcher(servers, pool.name, servers.data.path / "d.log"))
        time.sleep(o["snapshot_s"])
    counted = text("SELECT count(*) FROM jobs WHERE pool = :pool AND finished_at >= :since AND state = 'succeeded'")
    for pool in pools:
        _check_living(work, pool)
        with transaction(work) as conn:
            allow_minutes(conn)
            ended = conn.execute(counted, {"pool": pool.name, "since": since}).scalar_one()
        record.say(f"{pool.name}: {ended} jobs ended while the snapshot aged for {o['snapshot_s']:.0f} s")
        o.setdefault("aged", {})[pool.name] = int(ended)
        end_leased(work, pool.name)


def _check_living(work: Engine, pool: Pool) -> None:
    with transaction(work) as conn:
        if num_living(conn, pool.name) < len(pool.workers):
            raise RuntimeError(f"leases lapsed in pool {pool.name}: this machine is too busy to measure on")


def _await_claims(work: Engine, pool: str) -> None:
    deadline = time.monotonic() + 60
    statement = text(
        "SELECT EXISTS (SELECT FROM workers w JOIN jobs j ON j.worker_id = w.id AND j.state = 'leased'"
        " WHERE w.pool = :pool)"
    )
    while True:
        with transaction(work) as conn:
            if conn.execute(statement, {"pool": pool}).scalar_one():
                return
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing was claimed in pool {pool}")
        time.sleep(0.1)


def _backend(work: Engine) -> int:
    """The dispatcher's session at the server."""
    with transaction(work) as conn:
        statement = text("SELECT pid FROM pg_stat_activity WHERE application_name = 'medley-dispatcher'")
        return int(conn.execute(statement).scalar_one())


def _now(work: Engine) -> Any:
    with transaction(work) as conn:
        return conn.execute(text("SELECT clock_timestamp()")).scalar_one()


@contextmanager
def snapshot(url: str) -> Iterator[None]:
    """Another session's view of the database, held open: no row that dies from now on may be removed."""
    engine = make_engine(url, name="snapshot", pool_size=1, idle_in_transaction_ms=0)
    with engine.connect().execution_options(isolation_level="REPEATABLE READ") as conn:
        conn.execute(text("SELECT count(*) FROM tenants"))
        yield
    engine.dispose()


@click.command()
@click.option("--workers", "num_workers", default=1_000, show_default=True)
@click.option("--tenants", "num_tenants", default=1_000, show_default=True)
@click.option("--adapters", "adapters_each", default=2, show_default=True, help="Of each tenant.")
@click.option("--queued", default=1_000_000, show_default=True)
@click.option("--few", default=10_000, show_default=True, help="Queued beside which that is compared.")
@click.option("--seconds", default=8.0, show_default=True, help="Of each measurement.")
@click.option("--warm-up", default=3.0, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Of each, taking turns.")
@click.option("--complete-jobs-s", default=2_000.0, show_default=True, help="Jobs that the fleet ends a second.")
@click.option("--aged-jobs", default=1_200_000, show_default=True, help="Claimed and ended while the snapshot is open.")
@click.option("--snapshot-s", default=0.0, show_default=True, help="Ages it for real: both fleets run so long instead.")
@click.option("--only", default="", help="One of small, large: one measurement, to be profiled; writes nothing.")
def main(only: str, **options: Any) -> None:
    """Measure the dispatcher at scale, and write the result."""
    with (
        tempfile.TemporaryDirectory(prefix="medley-scale-") as scratch,
        EmbeddedServers(DataDir.acquire(Path(scratch) / "data")) as servers,
    ):
        upgrade(servers.database_url("medley_owner"))
        _run(servers, only, **options)


def _run(servers: EmbeddedServers, only: str, **o: Any) -> None:
    url = servers.database_url("medley_work")
    work, owner = make_engine(url, name="bench", pool_size=2), _bulk_owner(servers)
    adapters = make_tenants(owner, o["num_tenants"], o["adapters_each"])
    sizes = {"small": o["few"], "large": o["queued"]}
    if only:
        sizes = {only: sizes[only]}
    pools = {name: make_pool(work, owner, name, adapters, o["num_workers"]) for name in (*sizes, "bare")}
    record.say(f"{o['num_tenants']} tenants, {len(adapters)} adapters, {o['num_workers']} workers a pool")
    for name, num in sizes.items():
        fill(work, pools[name], num)
    if not only:
        fill(work, pools["bare"], 400_000)
    with owner.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(text("VACUUM (ANALYZE) jobs"))
    timing = {"seconds": o["seconds"], "warm_up": o["warm_up"], "rate": o["complete_jobs_s"]}
    rows: list[dict[str, Any]] = []

    def one(name: str, is_old: bool) -> None:
        got = measure(servers, work, pools[name], keep_queued=sizes[name], **timing)
        rows.append({"what": name, "old_snapshot": is_old, **got})
        record.say(str(rows[-1]))

    def floor(is_old: bool) -> None:
        for lanes_a_claim in (0, 500):
            got = bare_claims(url, pools["bare"], NUM_BARE_CLAIMS, JOBS_A_BARE_CLAIM, lanes_a_claim)
            rows.append({"what": "bare", "old_snapshot": is_old, "lanes_a_claim": lanes_a_claim, **got})
            record.say(str(rows[-1]))
            end_leased(work, "bare")
        fill(work, pools["bare"], 2 * NUM_BARE_CLAIMS * JOBS_A_BARE_CLAIM)

    if only:
        one(only, False)
        return
    for _ in range(o["rounds"]):
        floor(False)
        for name in sizes:
            one(name, False)
    floor(False)
    _write(rows, o)  # should the long part fail, this much is there
    with snapshot(url):
        if o["snapshot_s"]:
            run_on(servers, work, [pools[name] for name in sizes], sizes, o)
        else:
            for name in sizes:
                age(work, pools[name], o["aged_jobs"])
        for _ in range(o["rounds"]):
            for name in sizes:
                one(name, True)
    _write(rows, o)
    for engine in (work, owner):
        engine.dispose()


def _bulk_owner(servers: EmbeddedServers) -> Engine:
    return make_engine(servers.database_url("medley_owner"), name="bench", pool_size=1)


def _write(rows: list[dict[str, Any]], options: dict[str, Any]) -> None:
    def mean(key: str, **which: Any) -> float:
        found: list[float] = [row[key] for row in rows if all(row.get(name) == value for name, value in which.items())]
        return sum(found) / len(found)

    bare = mean("jobs_core_s", what="bare", lanes_a_claim=0)
    bare_of_lanes = mean("jobs_core_s", what="bare", lanes_a_claim=500)
    summary: dict[str, Any] = {"what": "summary", "max_num_seqs": MAX_NUM_SEQS, **options}
    for is_old in sorted({row["old_snapshot"] for row in rows}):
        small, large = (mean("jobs_core_s", what=name, old_snapshot=is_old) for name in ("small", "large"))
        key = "old_snapshot" if is_old else "no_snapshot"
        summary[key] = {
            "jobs_core_s": round(large),
            "jobs_s": round(mean("jobs_s", what="large", old_snapshot=is_old)),
            "over_bare": round(large / bare, 3),
            "over_bare_of_lanes": round(large / bare_of_lanes, 3),
            "over_few_queued": round(large / max(1, small), 3),
        }
    summary["peak_rss_mib"] = max(row["peak_rss_mib"] for row in rows if "peak_rss_mib" in row)
    path = record.write(
        "fleet-scale", f"python -m benchmarks.fleet_scale {' '.join(sys.argv[1:])}".strip(), [summary, *rows]
    )
    record.say(f"{summary}\nwrote {path}")


if __name__ == "__main__":
    main()
