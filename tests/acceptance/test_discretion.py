"""Prompts and answers stay where they belong: whatever becomes of a job, no process's log and no message holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis
from api_server import ADAPTERS, MODEL, adapter_files
from sqlalchemy import create_engine, text
from waiting import wait_until

from medley.client import Client
from medley.local.stack import LocalStack

WAIT_S = 60.0


class Stack:
    """A whole service that says all it can, and the words that it must not say."""

    def __init__(self, stack: LocalStack) -> None:
        self.stack = stack
        self.key = stack.add_tenant("acme")
        self.canaries: list[str] = []
        headers = {"Authorization": f"Bearer {self.key}"}
        self.http = httpx.Client(base_url=stack.url, headers=headers, timeout=60)
        self.client = Client(stack.url, self.key)

    def canary(self) -> str:
        """A word that is nowhere else."""
        self.canaries.append(f"kanarie{len(self.canaries):03d}vogel")
        return self.canaries[-1]

    def refused(self, method: str, path: str, status: int = 400, **request: Any) -> None:
        response = self.http.request(method, path, **request)
        assert response.status_code == status, response.text

    def owner(self, statement: str) -> None:
        engine = create_engine(self.stack.database_url("medley_owner"))
        with engine.begin() as conn:
            conn.execute(text(statement))
        engine.dispose()

    @contextmanager
    def refusing(self, table: str, condition: str) -> Iterator[None]:
        """Within the block the database refuses rows of which this holds, and quotes them as it does."""
        self.owner(f"ALTER TABLE {table} ADD CONSTRAINT refusing CHECK (({condition}) IS NOT TRUE) NOT VALID")
        yield
        self.owner(f"ALTER TABLE {table} DROP CONSTRAINT refusing")

    def log(self) -> str:
        return self.stack.log_path.read_text()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("stack") / "data"
    environ = {"MEDLEY_LOG_LEVEL": "debug"}
    with LocalStack(folder, model=MODEL, environ=environ) as stack:
        made = Stack(stack)
        yield made
        made.http.close()
        made.client.close()


def test_no_word_of_a_prompt_or_an_answer_is_in_any_log_or_message(service: Stack) -> None:
    _what_succeeds(service)
    _what_is_refused(service)
    _what_fails(service)
    _what_the_database_refuses(service)
    _what_an_engine_dies_of(service)
    log = service.log()
    for process in ("api", "dispatcher", "tasks", "worker.0", "postgres"):
        assert f"{process} " in log, f"{process} has said something"
    assert [line for line in log.splitlines() if any(canary in line for canary in service.canaries)] == []
    with redis.Redis.from_url(service.stack.redis_url) as client:
        held = b" ".join(_values(client))
    assert [canary for canary in service.canaries if canary.encode() in held] == []


def _what_succeeds(service: Stack) -> None:
    service.client.adapters.add("reverse", ADAPTERS / "reverse")
    result = service.client.submit(service.canary() + "=", adapter="reverse", max_tokens=24).result(timeout=WAIT_S)
    if len(result.text) > 8:
        service.canaries.append(result.text)
    prompts = [{"prompt": service.canary(), "expected": service.canary()} for _ in range(3)]
    sweep = service.client.sweep("s", prompts, adapters=["reverse"], include_base=True, max_tokens=4)
    assert sweep.wait(timeout=WAIT_S).counts.succeeded == 6
    batch = service.client.submit_many([{"prompt": service.canary(), "stop": [service.canary()]}] * 2, max_tokens=4)
    assert len(list(batch.results(timeout=WAIT_S))) == 2


def _what_is_refused(service: Stack) -> None:
    def word() -> str:
        return service.canary()

    service.refused(
        "POST", "/v1/jobs", json={"prompt": word(), "temperature": word(), word(): 1, "stop": [word()] * 99}
    )
    service.refused("POST", "/v1/jobs", content=f'{{"prompt": "{word()}'.encode())
    service.refused("POST", "/v1/jobs", json={"prompt": word() * 30_000})
    service.refused("POST", "/v1/batches", json={"jobs": [{"prompt": word()}, {"prompt": 1}]})
    lines = {"Content-Type": "application/x-ndjson"}
    service.refused("POST", "/v1/batches", content=f'{{"prompt": "{word()}"}}\n{word()}\n'.encode(), headers=lines)
    service.refused("POST", "/v1/batches", params={"defaults": word()}, content=b"{}", headers=lines)
    service.refused("POST", "/v1/sweeps", json={"name": "t", "prompts": [word(), {"prompt": word(), "x": 1}]})
    service.refused("PUT", "/v1/adapters/a", files=adapter_files(config=word().encode(), weights=word().encode()))
    service.refused("GET", f"/v1/jobs/{word()}", 404)
    service.refused("POST", f"/{word()}", 404, json={"prompt": word()})
    used = {"Idempotency-Key": "k"}
    assert service.http.post("/v1/jobs", json={"prompt": word()}, headers=used).status_code == 201
    service.refused("POST", "/v1/jobs", 409, json={"prompt": word()}, headers=used)


def _what_fails(service: Stack) -> None:
    long = service.client.submit(service.canary() * 4_000, max_tokens=4)
    bad = service.client.submit([10_000_000], max_tokens=4)
    wait_until(lambda: long.refresh().state == bad.refresh().state == "failed", "two failures", WAIT_S)
    assert long.status.error is not None
    assert long.status.error.code == "prompt_too_long"
    assert service.canaries[-1] not in long.status.error.message


def _what_the_database_refuses(service: Stack) -> None:
    word = service.canary()
    with service.refusing("job_inputs", f"prompt LIKE '%' || '{word[:9]}' || '%{word[9:]}%'"):
        service.refused("POST", "/v1/jobs", 500, json={"prompt": word})
        lines = {"Content-Type": "application/x-ndjson"}
        content = f'{{"prompt": "{word}"}}\n'.encode() * 3
        service.refused("POST", "/v1/batches", 500, content=content, headers=lines)
    word = service.canary()
    with service.refusing("sweeps", "name = 'refused'"):
        service.refused(
            "POST", "/v1/sweeps", 500, json={"name": "refused", "prompts": [word], "include_base": True, "stop": [word]}
        )
    # The worker's own: the answer of a job that runs is refused.
    seen = len(service.log())
    with service.refusing("job_results", "true"):
        job = service.client.submit(service.canary(), max_tokens=6, ignore_eos=True)
        wait_until(lambda: "worker.0" in service.log()[seen:], "the worker's complaint", WAIT_S)
    wait_until(lambda: job.refresh().has_ended, "its end", WAIT_S)
    if job.status.result is not None and len(job.status.result.text) > 5:
        service.canaries.append(job.status.result.text)


def _what_an_engine_dies_of(service: Stack) -> None:
    jobs = [{"prompt": service.canary()} for _ in range(400)]  # which do not end before this does
    batch = service.client.submit_many(jobs, max_tokens=100, ignore_eos=True)
    wait_until(lambda: any(worker.num_leased for worker in service.client.workers()), "jobs that run", WAIT_S)
    worker = psutil.Process(service.stack.pid("worker", 0))
    for engine in [child for child in worker.children(recursive=True) if "engine.process" in " ".join(child.cmdline())]:
        engine.kill()
    wait_until(lambda: "engine.died" in service.log(), "what the worker says of it", WAIT_S)
    batch.cancel()
    batch.wait(timeout=WAIT_S)


def _values(client: redis.Redis) -> Iterator[bytes]:
    """All that Redis holds."""
    for key in client.scan_iter():
        yield key
        yield client.dump(key) or b""
