"""A worker whose model two processes share: the same answers, one report, sleep, and a killed rank that costs none."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from shells import ShellProcess, Site

from medley.db.workers import WorkerState
from medley.demo import ADAPTERS_DIR, MODEL_DIR
from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME

WAIT_S = 180.0  # processes import torch one after another on a busy machine


@pytest.fixture(scope="module")
def site(module_database: Any, embedded: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    site = Site(module_database, embedded.redis_url, (folder / "store").as_uri(), MODEL_DIR, folder)
    yield site
    site.close()


def start(site: Site, num_ranks: int, **environ: str) -> ShellProcess:
    given = {"MEDLEY_LOAD_FORMAT": "safetensors", "MEDLEY_LEASE_S": "20"} | environ
    return site.start_shell(MEDLEY_TENSOR_PARALLEL=str(num_ranks), **given)


def rank_of(shell: ShellProcess) -> int:
    """The process id of the engine's other rank."""
    children = psutil.Process(shell.engine_pid()).children()
    (pid,) = (c.pid for c in children if "medley_worker.engine.parallel.process" in c.cmdline())
    return pid


def add_demo_adapter(site: Site, name: str) -> Any:
    folder = ADAPTERS_DIR / name
    digest = site.store.put((folder / CONFIG_NAME).read_bytes(), folder / WEIGHTS_NAME)
    return site.add_revision(name, seed=0, digest=digest)


@pytest.mark.slow
def test_the_demos_answers_are_those_of_one_process_and_a_killed_rank_costs_none(site: Site) -> None:
    names = sorted(path.name for path in ADAPTERS_DIR.iterdir())[:5]
    revisions = [None, *(add_demo_adapter(site, name) for name in names)]
    jobs = [{"prompt": f"planet{i}=", "revision": r, "max_tokens": 200} for i in range(3) for r in revisions]
    shared = start(site, 2)
    rows = site.run(shared, *jobs)
    assert [row.error_code for row in rows] == [None] * len(jobs)

    def says_two() -> bool:
        return any(row.id == shared.worker and row.stats.get("num_devices") == 2 for row in site.workers())

    site.wait_until("the row says how many devices", says_two)

    batch = site.submit(*jobs)
    site.ring(shared, site.claim(shared))
    site.wait_computing(shared)
    os.kill(rank_of(shared), signal.SIGKILL)
    again = site.wait_results(batch, len(jobs), WAIT_S)
    assert "rank 1 was ended by signal 9" in shared.log()
    assert [row.token_ids for row in again] == [row.token_ids for row in rows]
    assert max(job.crashes for job in site.jobs(batch)) <= 1

    alone = site.run(start(site, 1), *jobs)
    assert [row.token_ids for row in alone] == [row.token_ids for row in rows]
    for one, two in zip(alone, rows, strict=True):
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)


def test_a_rank_that_dies_while_the_worker_sleeps_costs_an_engine_and_no_answer(site: Site) -> None:
    jobs = [{"prompt": f"planet{i}=", "max_tokens": 20} for i in range(3)]
    shell = start(site, 2, MEDLEY_SLEEP="host")
    before = [row.token_ids for row in site.run(shell, *jobs)]
    engine = shell.engine_pid()
    for num_engines in (1, 2):
        site.desire(shell, WorkerState.ASLEEP)
        site.wait_state(shell, "asleep")
        if num_engines == 2:
            os.kill(rank_of(shell), signal.SIGKILL)
            site.wait_until("its end", lambda: "engine.died" in shell.log())
            assert "rank 1 was ended by signal 9" in shell.log()
        site.desire(shell, WorkerState.ACTIVE)
        site.wait_state(shell, "active")
        assert [row.token_ids for row in site.run(shell, *jobs)] == before
        assert shell.log().count("engine.started") == num_engines
        assert (shell.engine_pid() == engine) is (num_engines == 1)
