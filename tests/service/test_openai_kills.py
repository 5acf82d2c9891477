"""The task process killed while it judges, makes jobs of and finalises an OpenAI batch: the next one ends it right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import pytest
from api_server import MODEL, Api
from openai_service import (
    client_of,
    close_clients,
    completion_line,
    create,
    finish_queued,
    make_tasks,
    read_lines,
)
from sqlalchemy import text
from waiting import wait_until

from medley.config import Limits
from medley.db import openai_batches
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState

LIMITS = Limits()
NUM_LINES = 1_000
# Chunks so small, and with a rest after each, that a kill finds the work in its middle, however late it comes.
PROGRAM = """
import time
import medley.tasks.validate, medley.tasks.finalize
medley.tasks.validate.LINES_A_CHUNK = medley.tasks.validate.JOBS_A_CHUNK = {chunk}
medley.tasks.finalize.RESULTS_A_PAGE = {chunk}
from medley import logs
from medley.config import Settings
from medley.tasks import worker
worker.beat = lambda _: time.sleep({rest_s})
settings = Settings.from_env()
logs.configure("tasks", settings)
worker.run(settings)
"""
REST_S = 0.05

pytestmark = pytest.mark.faults


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> Iterator[None]:
    api.take_new_tenant()
    yield
    close_clients()


@contextmanager
def task_process(api: Api, database: Any, *, chunk: int) -> Iterator[subprocess.Popen[bytes]]:
    settings = api.settings
    environ = os.environ | {
        "MEDLEY_DATABASE_URL": database.url("medley_work"),
        "MEDLEY_REDIS_URL": settings.redis_url,
        "MEDLEY_STORE_URL": settings.store_url,
        "MEDLEY_MODEL": str(MODEL),
        "MEDLEY_POOL": settings.pool,
    }
    with subprocess.Popen([sys.executable, "-c", PROGRAM.format(chunk=chunk, rest_s=REST_S)], env=environ) as running:
        try:
            yield running
        finally:
            running.kill()


def read_row(api: Api, batch_id: str) -> Any:
    statement = text(
        "SELECT o.*, (SELECT count(*) FROM job_inputs i WHERE i.batch_id = o.id) AS num_made,"
        " o.due_at > o.created_at + interval '1 s' AS is_taken"
        " FROM (SELECT o.*, b.created_at FROM openai_batches o JOIN batches b ON b.id = o.id) o WHERE o.id = :id"
    )
    with api.ledger.working() as conn:
        return conn.execute(statement, {"id": UUID(batch_id.partition("_")[2])}).one()


def let_be_taken_over(api: Api, batch_id: str) -> None:
    """Lets the time pass for which a step is left to the one who took it."""
    statement = text("UPDATE openai_batches SET due_at = clock_timestamp() WHERE id = :id AND due_at IS NOT NULL")
    with api.ledger.working() as conn:
        conn.execute(statement, {"id": UUID(batch_id.partition("_")[2])})


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)


def test_a_batch_outlives_kills_in_each_of_its_steps(api: Api, module_database: Any) -> None:
    client = client_of(api)
    lines = [completion_line(f"line-{i}", prompt=["a", "b"] if i % 10 == 0 else "a") for i in range(NUM_LINES)]
    batch = create(client, lines)
    with task_process(api, module_database, chunk=3) as process:
        wait_until(lambda: read_row(api, batch.id).is_taken)
        kill(process)
    assert client.batches.retrieve(batch.id).status == "validating"
    let_be_taken_over(api, batch.id)
    make_tasks(api)._step(UUID(batch.id.partition("_")[2]))
    with task_process(api, module_database, chunk=3) as process:
        wait_until(lambda: read_row(api, batch.id).num_made > 0)
        kill(process)
    cut = read_row(api, batch.id)
    assert cut.state == "in_progress"
    assert 0 < cut.num_made < cut.num_jobs == NUM_LINES * 11 // 10
    let_be_taken_over(api, batch.id)
    make_tasks(api).look()
    assert read_row(api, batch.id).num_made == cut.num_jobs
    finish_queued(api)
    with task_process(api, module_database, chunk=1) as process:
        wait_until(lambda: client.batches.retrieve(batch.id).status == "finalizing")
        kill(process)
    assert client.batches.retrieve(batch.id).output_file_id is None
    let_be_taken_over(api, batch.id)
    make_tasks(api).look()
    ended = client.batches.retrieve(batch.id)
    assert ended.status == "completed"
    assert ended.request_counts.completed == ended.request_counts.total == NUM_LINES
    found = read_lines(client, ended.output_file_id)
    assert [line["custom_id"] for line in found] == [f"line-{i}" for i in range(NUM_LINES)]
    expected = [2 if i % 10 == 0 else 1 for i in range(NUM_LINES)]
    assert [len(line["response"]["body"]["choices"]) for line in found] == expected
    api.ledger.check()


def test_a_retried_batch_outlives_a_kill_while_its_next_files_are_written(api: Api, module_database: Any) -> None:
    client = client_of(api)
    batch = create(client, [completion_line(str(i)) for i in range(200)])
    tasks = make_tasks(api)
    tasks.look()
    api.finish(batch.id, 150, text="early")
    broken = JobError(code=ErrorCode.ENGINE, message="it broke")
    api.finish(batch.id, state=JobState.FAILED, text=None, error=broken)
    tasks.look()
    first = client.batches.retrieve(batch.id)
    assert api.as_tenant().post(f"/v1/batches/{batch.id}/retry").status_code == 200
    finish_queued(api, text="late")
    with task_process(api, module_database, chunk=1) as process:
        wait_until(lambda: client.batches.retrieve(batch.id).status == "finalizing", timeout_s=60)
        kill(process)
    cut = client.batches.retrieve(batch.id)
    assert (cut.status, cut.output_file_id, cut.error_file_id) == ("finalizing", None, None)
    assert len(read_lines(client, first.output_file_id)) == 150
    let_be_taken_over(api, batch.id)
    tasks.look()
    ended = client.batches.retrieve(batch.id)
    assert (ended.status, ended.request_counts.completed, ended.error_file_id) == ("completed", 200, None)
    found = read_lines(client, ended.output_file_id)
    assert [line["custom_id"] for line in found] == [str(i) for i in range(200)]
    texts = [line["response"]["body"]["choices"][0]["text"] for line in found]
    assert texts == ["early"] * 150 + ["late"] * 50
    api.ledger.recount()


def test_two_tasks_that_work_on_one_batch_do_no_harm(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line(str(i)) for i in range(5)])
    id_ = UUID(batch.id.partition("_")[2])
    first, second = make_tasks(api), make_tasks(api)

    def both(name: str) -> None:
        with api.ledger.working() as conn:
            row = openai_batches.take_step(conn, id_, api.ledger.pool)
        act = {"validate": "_validator", "expand": "_validator", "finalize": "_finalizer"}[name]
        for tasks in (first, second):
            getattr(getattr(tasks, act), name)(row)

    both("validate")
    both("expand")
    assert read_row(api, batch.id).num_made == 5
    finish_queued(api)
    with api.ledger.working() as conn:
        openai_batches.begin_finalizing(conn, api.ledger.pool)
    both("finalize")
    ended = client.batches.retrieve(batch.id)
    assert (ended.status, len(read_lines(client, ended.output_file_id))) == ("completed", 5)
    assert len(list(client.files.list(purpose="batch_output"))) == 1
    api.ledger.check()
