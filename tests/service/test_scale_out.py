"""The scale hook and the metrics of a real dispatcher process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ledger import Ledger
from prometheus_client.parser import text_string_to_metric_families
from receiver import Receiver, receiving
from sqlalchemy import text
from waiting import wait_until

from medley.db.workers import WorkerState
from medley.spec.webhooks import verify

SECRET = "whsec_" + "QUJD" * 10


@pytest.fixture
def ledger(database: Any) -> Iterator[Ledger]:
    ledger = Ledger(database)
    yield ledger
    ledger.close()


class Process:
    def __init__(self, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.popen = popen
        self._log = log

    def log(self) -> str:
        return self._log.read_text()

    def metrics(self) -> dict[str, float]:
        """By name and the values of labels but the pool's."""
        found = re.search(r"metrics.served.*port=(\d+)", self.log())
        assert found is not None
        with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            samples = [sample for family in families for sample in family.samples]
        for sample in samples:
            assert set(sample.labels) <= {"pool", "state", "type", "outcome"}, sample
        return {
            " ".join([s.name, *(value for key, value in sorted(s.labels.items()) if key != "pool")]): s.value
            for s in samples
        }


@pytest.fixture
def start(database: Any, embedded: Any, ledger: Ledger, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def start_one(**environ: str) -> Process:
        log = tmp_path / f"dispatcher{len(started)}.log"
        env = os.environ | {
            "MEDLEY_DATABASE_URL": database.url("medley_work"),
            "MEDLEY_REDIS_URL": embedded.redis_url,
            "MEDLEY_STORE_URL": "file:///nowhere",
            "MEDLEY_POOL": ledger.pool,
            "MEDLEY_TICK_S": "2",  # a term is three of them: a busy machine must not end one
            "MEDLEY_METRICS_PORT": "0",
        }
        with log.open("wb") as out:
            popen = subprocess.Popen(
                [sys.executable, "-m", "medley", "dispatcher"], env=env | environ, stderr=out, stdout=out
            )
        process = Process(popen, log)
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.popen.kill()
        process.popen.wait()


def hook_file(folder: Path, body: str) -> Path:
    """An executable that appends its input to calls.jsonl and then does `body`."""
    path = folder / "hook"
    path.write_text(f"#!/bin/sh\ncat >> {folder}/calls.jsonl; echo >> {folder}/calls.jsonl\n{body}\n")
    path.chmod(0o755)
    return path


def calls_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_an_executable_is_told_what_is_missing_and_what_may_go(
    ledger: Ledger, start: Callable[..., Process], tmp_path: Path
) -> None:
    tenant = ledger.add_tenant()
    batch = ledger.submit(tenant, [None] * 30)
    hook = hook_file(
        tmp_path, f"env > {tmp_path}/env; [ -e {tmp_path}/heard ] || {{ touch {tmp_path}/heard; exit 3; }}"
    )
    process = start(MEDLEY_SCALE_HOOK=str(hook), MEDLEY_SCALE_RELEASE_AFTER_S="1", MEDLEY_SCALE_REPEAT_S="1")
    wait_until(lambda: len(calls_of(tmp_path)) >= 3, timeout_s=60)
    first, again, repeated, *_ = calls_of(tmp_path)
    assert first["type"] == "workers.wanted"
    assert (first["wanted"], first["registered"], first["missing"], first["queued_jobs"]) == (1, 0, 1, 30)
    assert first == again == repeated, "the one that failed, and the one that was heard, under one id"
    assert "scale.call_failed" in process.log()
    assert "status 3" in process.log()
    assert "MEDLEY_DATABASE_URL" not in (tmp_path / "env").read_text()

    ledger.flag(tenant, batch, "cancel")
    worker = ledger.start_worker(WorkerState.ASLEEP)
    with ledger.working() as conn:
        conn.execute(text("UPDATE workers SET state = 'asleep', desired_state = 'asleep'"))
    wait_until(lambda: calls_of(tmp_path)[-1]["type"] == "workers.releasable", timeout_s=60)
    assert [w["id"] for w in calls_of(tmp_path)[-1]["workers"]] == [f"worker_{worker.hex}"]


def test_a_url_is_posted_to_signed_and_again_until_it_answers_well(
    ledger: Ledger, start: Callable[..., Process]
) -> None:
    ledger.submit(ledger.add_tenant(), [None])
    with receiving() as receiver:
        receiver.statuses = [500]
        start(MEDLEY_SCALE_HOOK=f"{receiver.url}/scale", MEDLEY_SCALE_HOOK_SECRET=SECRET)
        wait_until(lambda: len(receiver.received) >= 2, timeout_s=60)
        _judge(receiver)


def _judge(receiver: Receiver) -> None:
    first, again = receiver.received[:2]
    assert first.path == "/scale"
    for received in (first, again):
        verify(received.body, received.headers, SECRET)
    assert first.body == again.body
    assert (first.event["type"], first.event["wanted"], first.event["registered"]) == ("workers.wanted", 1, 0)
    assert {k.lower(): v for k, v in first.headers.items()}["webhook-id"] == first.event["id"]


def test_a_hook_that_hangs_stops_no_plan_and_is_ended(
    ledger: Ledger, start: Callable[..., Process], tmp_path: Path
) -> None:
    tenant = ledger.add_tenant()
    hook = hook_file(tmp_path, "sleep 600")
    ledger.submit(tenant, [None] * 10)
    process = start(MEDLEY_SCALE_HOOK=str(hook), MEDLEY_SCALE_HOOK_TIMEOUT_S="3")
    wait_until(lambda: len(calls_of(tmp_path)) == 1, timeout_s=60)
    worker = ledger.start_worker(max_num_seqs=10)
    began = time.monotonic()
    wait_until(lambda: all(row.worker_id == worker for row in ledger.jobs().values()), timeout_s=60)
    assert time.monotonic() - began < 20
    wait_until(lambda: "no end within 3 s" in process.log(), timeout_s=60)


def test_metrics_tell_the_queue_the_fleet_and_what_was_counted_and_no_tenant(
    ledger: Ledger, start: Callable[..., Process]
) -> None:
    tenant, worker = ledger.add_tenant(), ledger.start_worker(max_num_seqs=2)
    ledger.start_worker(WorkerState.ASLEEP)
    ledger.submit(tenant, [None] * 30)
    process = start()
    wait_until(lambda: "metrics.served" in process.log(), timeout_s=60)
    wait_until(lambda: process.metrics().get("medley_leased_jobs", 0) == 4, timeout_s=60)
    found = process.metrics()
    expected = {
        "medley_leader": 1,
        "medley_queued_jobs": 26,
        "medley_queued_lanes": 1,
        "medley_workers active": 1,
        "medley_workers_registered": 2,
        "medley_rows": 2,
        "medley_rows_used": 0,
        "medley_claimed_jobs_total": 4,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["medley_queued_tokens"] > 26
    assert found["medley_workers_wanted"] >= 1
    assert found["medley_generated_tokens_total"] == 0
    for tokens in (1_000, 1_500):
        ledger.renew(worker, max_num_seqs=2, stats={"generated_tokens": tokens, "steps": tokens / 2})
        total = tokens - 0.0
        wait_until(lambda total=total: process.metrics()["medley_generated_tokens_total"] == total, timeout_s=60)
    assert tenant.hex not in str(found)
    standby = start()
    wait_until(lambda: "metrics.served" in standby.log(), timeout_s=60)
    assert standby.metrics()["medley_leader"] == 0
    assert "medley_queued_jobs" not in standby.metrics()


def test_a_hook_that_cannot_run_is_refused_at_the_start(start: Callable[..., Process], tmp_path: Path) -> None:
    path = tmp_path / "no-hook"
    path.write_text("")
    process = start(MEDLEY_SCALE_HOOK=str(path))
    assert process.popen.wait(60) == 1
    assert "MEDLEY_SCALE_HOOK: got" in process.log()
