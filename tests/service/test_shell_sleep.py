"""A shell whose engine sleeps while the worker does: one process over many sleeps, and every way for it to go wrong."""

from __future__ import annotations

import os
import signal
from typing import Any
from uuid import UUID

import psutil
import pytest
from shells import ShellProcess, Site
from waiting import alive

from medley.db.workers import WorkerState

LONG = {"prompt": "a long answer", "max_tokens": 3_000, "temperature": 1.0, "seed": 7}
SHORTER = LONG | {"max_tokens": 1_200}


def start(site: Site, *, active: bool = True, **environ: str) -> ShellProcess:
    return site.start_shell(active=active, **{"MEDLEY_SLEEP": "host"} | environ)


def sleep(site: Site, shell: ShellProcess) -> None:
    site.desire(shell, WorkerState.ASLEEP)
    site.wait_state(shell, "asleep")


def wake(site: Site, shell: ShellProcess) -> None:
    site.desire(shell, WorkerState.ACTIVE)
    site.wait_state(shell, "active")


def texts(site: Site, shell: ShellProcess, *jobs: dict[str, Any]) -> list[str]:
    rows = site.run(shell, *jobs)
    assert [row.state for row in rows] == ["succeeded"] * len(jobs)
    return [row.text for row in rows]


def engines(shell: ShellProcess) -> list[int]:
    children = psutil.Process(shell.process.pid).children()
    return [c.pid for c in children if "medley_worker.engine.process" in c.cmdline()]


def test_one_engine_serves_over_many_sleeps_with_the_same_answers(site: Site) -> None:
    shell = start(site)
    one, two = site.add_revision("one", seed=1), site.add_revision("two", seed=2)
    jobs = [{"prompt": "abc", "revision": revision} for revision in (None, one, two)]
    before, engine = texts(site, shell, *jobs), shell.engine_pid()
    for _ in range(3):
        sleep(site, shell)
        (row,) = site.workers()
        assert (row.resident, row.num_pages, row.stats["tiles_used"]) == ([], 0, 0)
        assert row.stats["device_bytes"] == 0, "a CPU"
        assert shell.engine_pid() == engine
        wake(site, shell)
        (row,) = site.workers()
        assert row.num_pages > 0
        assert texts(site, shell, *jobs) == before
        assert shell.engine_pid() == engine
    assert shell.log().count("engine.started") == 1


def test_jobs_of_a_drained_worker_go_on_where_they_were_once_it_wakes(site: Site) -> None:
    shell = start(site)
    (whole,) = texts(site, shell, LONG)
    batch = site.submit(LONG)
    site.ring(shell, site.claim(shell))
    site.wait_computing(shell)
    sleep(site, shell)
    assert [job.state for job in site.jobs(batch)] == ["queued"]
    assert all(site.checkpoints().values())
    wake(site, shell)
    site.claim(shell)
    (row,) = site.wait_results(batch, 1)
    assert (row.text, row.attempt) == (whole, 2)


def test_a_wake_that_comes_while_it_drains_is_heeded(site: Site) -> None:
    shell = start(site)
    for _ in range(3):
        batch = site.submit(SHORTER, SHORTER | {"seed": 8})
        site.ring(shell, site.claim(shell))
        site.desire(shell, WorkerState.ASLEEP)
        site.wait_until("a worker that drains", lambda: site.workers()[0].state != "active")
        wake(site, shell)

        def are_done(batch: UUID = batch) -> bool:
            site.ring(shell, site.claim(shell))  # again what was given back after the wake
            return len(site.results(batch)) == 2

        site.wait_until("2 results", are_done)
        assert [row.state for row in site.results(batch)] == ["succeeded"] * 2
    assert shell.log().count("engine.started") == 1


def test_an_engine_that_dies_asleep_is_started_anew_by_the_next_wake(site: Site) -> None:
    shell = start(site)
    before = texts(site, shell, {"prompt": "abc"})
    sleep(site, shell)
    os.kill(shell.engine_pid(), signal.SIGKILL)
    site.wait_until("its end", lambda: "engine.died" in shell.log())
    assert site.workers()[0].state == "asleep"
    wake(site, shell)
    assert texts(site, shell, {"prompt": "abc"}) == before
    assert shell.log().count("engine.started") == 2


def test_sigterm_ends_a_sleeping_worker_and_its_engine(site: Site) -> None:
    shell = start(site)
    sleep(site, shell)
    engine = psutil.Process(shell.engine_pid())
    shell.send(signal.SIGTERM)
    assert shell.wait(12) == 0, shell.log()
    assert [row.state for row in site.workers()] == ["gone"]
    site.wait_until("the engine's end", lambda: not alive([engine]))


@pytest.mark.parametrize("is_told", [True, False])
def test_a_worker_that_is_to_go_does_not_wait_for_an_engine_that_falls_asleep(site: Site, is_told: bool) -> None:
    """is_told: by its row; else by SIGTERM."""
    shell = start(site)
    engine = psutil.Process(shell.engine_pid())
    engine.suspend()  # it will not answer
    site.desire(shell, WorkerState.ASLEEP)
    site.wait_state(shell, "draining")
    if is_told:
        site.desire(shell, WorkerState.GONE)
    else:
        shell.send(signal.SIGTERM)
    assert shell.wait(12) == 0, shell.log()
    assert [row.state for row in site.workers()] == ["gone"]
    site.wait_until("the engine's end", lambda: not alive([engine]))


def test_a_sleeping_worker_that_loses_its_lease_ends_with_its_engine(site: Site) -> None:
    shell = start(site)
    sleep(site, shell)
    engine = psutil.Process(shell.engine_pid())
    shell.send(signal.SIGSTOP)
    site.lapse(shell)
    site.reclaim()
    assert [row.state for row in site.workers()] == ["gone"]
    shell.send(signal.SIGCONT)
    assert shell.wait() == 4, shell.log()
    site.wait_until("the engine's end", lambda: not alive([engine]))


def test_a_worker_whose_state_is_changed_faster_than_it_follows_ends_as_it_was_told_last(site: Site) -> None:
    shell = start(site)
    before = texts(site, shell, {"prompt": "abc"})
    for i in range(12):
        num_heard = shell.log().count("worker.desired")
        site.desire(shell, WorkerState.ACTIVE if i % 2 else WorkerState.ASLEEP)
        site.wait_until("it heard", lambda n=num_heard: shell.log().count("worker.desired") > n)  # type: ignore[misc]
    batch = site.submit({"prompt": "abc"})

    def is_done() -> bool:
        site.ring(shell, site.claim(shell))  # again where it was given back, by a sleep that was under way
        return bool(site.results(batch))

    site.wait_until("a result", is_done)
    assert [row.text for row in site.results(batch)] == before
    site.wait_state(shell, "active")
    assert shell.log().count("engine.started") == 1


def test_sigkill_of_a_sleeping_worker_ends_its_engine(site: Site) -> None:
    shell = start(site)
    sleep(site, shell)
    engine = psutil.Process(shell.engine_pid())
    shell.send(signal.SIGKILL)
    shell.wait()
    site.wait_until("the engine's end", lambda: not alive([engine]))


@pytest.mark.parametrize(("change", "num_before"), [("sleep", 0), ("wake", 1)])
def test_an_engine_that_cannot_sleep_or_wake_is_replaced(site: Site, change: str, num_before: int) -> None:
    """num_before: engines there are while the worker is asleep."""
    shell = start(site, MEDLEY_ENGINE_FAILPOINT=f"die_on_{change}=always")
    before = texts(site, shell, {"prompt": "abc"})
    sleep(site, shell)
    assert len(engines(shell)) == num_before
    wake(site, shell)
    assert texts(site, shell, {"prompt": "abc"}) == before
    assert shell.log().count("engine.started") == 2


def test_what_a_deleted_tenant_left_in_a_sleeping_engine_goes(site: Site) -> None:
    shell = start(site)
    gone, kept = site.add_revision("gone", seed=7), site.add_revision("kept", seed=8)
    (_, answer) = texts(site, shell, {"prompt": "abc", "revision": gone}, {"prompt": "abc", "revision": kept})
    sleep(site, shell)
    site.forget_revision(gone)
    site.wait_until("one adapter forgotten", lambda: "adapters.forgotten" in shell.log())
    wake(site, shell)
    assert texts(site, shell, {"prompt": "abc", "revision": kept}) == [answer]


def test_a_warm_worker_has_an_engine_asleep_before_its_first_wake(site: Site) -> None:
    shell = start(site, active=False, MEDLEY_SLEEP="warm")
    site.wait_until("an engine asleep", lambda: "engine.asleep" in shell.log())
    assert {row.state for row in site.workers()} == {"asleep"}
    (engine,) = engines(shell)
    wake(site, shell)
    before = texts(site, shell, {"prompt": "abc"})
    assert engines(shell) == [engine]
    sleep(site, shell)
    os.kill(engine, signal.SIGKILL)
    site.wait_until("another asleep", lambda: shell.log().count("engine.asleep") == 3)
    wake(site, shell)
    assert texts(site, shell, {"prompt": "abc"}) == before


def test_a_warm_worker_that_is_woken_while_it_loads_goes_on_to_work(site: Site) -> None:
    shell = start(site, active=False, MEDLEY_SLEEP="warm")
    site.wait_until("an engine", lambda: "engine.started" in shell.log())
    wake(site, shell)
    texts(site, shell, {"prompt": "abc"})
    assert shell.log().count("engine.started") == 1
