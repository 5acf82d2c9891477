"""SIGTERM in the middle of work, for each process: it ends well and soon, nothing is lost and nothing done twice."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from stacks import Service, finish, sweep_jobs

pytestmark = [pytest.mark.faults, pytest.mark.slow]

SEED = 20261123
# What workers have computed beyond what was delivered, summed over all that ever were.
_GENERATED = "SELECT coalesce(sum((stats->>'generated_tokens')::int8), 0) FROM workers"
_DELIVERED = "SELECT coalesce(sum(completion_tokens), 0) FROM job_results"


def ends(service: Service, name: str) -> list[str]:
    """How the supervisor says that a process ended, each time."""
    return re.findall(rf"{re.escape(name)} ended with ([^\n]*?) after", service.stack.log_path.read_text())


def catches_sigterm(pid: int) -> bool:
    try:
        found = re.search(r"^SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return found is not None and bool(int(found[1], 16) >> (signal.SIGTERM - 1) & 1)


def stop(service: Service, name: str, index: int | None = None) -> None:
    """SIGTERM, and wait until the supervisor has seen its end."""
    full = name if index is None else f"{name}.{index}"
    before = len(ends(service, full))
    # A process that is still importing has begun nothing, and SIGTERM simply ends it.
    service.wait_until(f"{full} to heed signals", lambda: catches_sigterm(service.stack.pid(name, index)))
    service.stack.kill(name, index, signal.SIGTERM)
    service.wait_until(f"the end of {full}", lambda: len(ends(service, full)) > before, 60)


def test_a_worker_gives_its_jobs_back_with_all_that_they_have(start_service: Callable[..., Service]) -> None:
    service = start_service(workers=2, MEDLEY_LEASE_S="20")
    jobs = [job | {"max_tokens": 200, "ignore_eos": True} for job in sweep_jobs(SEED, 240)]
    batch = service.client.submit_many(jobs)
    for share, index in ((0.1, 0), (0.3, 1), (0.6, 0)):
        service.wait_progress(batch, share)
        stop(service, "worker", index)
    finish(service, batch)
    assert set(ends(service, "worker.0") + ends(service, "worker.1")) == {"exit status 0"}
    assert service.scalar("SELECT count(*) FROM workers WHERE state = 'gone'") == 3
    assert service.scalar("SELECT max(attempt) FROM jobs") > 1, "jobs were moved"
    assert "worker.gone" not in service.stack.log_path.read_text(), "nothing waited for a lease to lapse"
    delivered = service.scalar(_DELIVERED)
    assert delivered == 240 * 200
    # The workers that live say their last totals within a renewal.
    service.wait_until("the totals", lambda: service.scalar(_GENERATED) >= delivered, 60)
    assert service.scalar(_GENERATED) == delivered, "no token was generated twice"


def test_a_dispatcher_resigns_and_the_next_one_leads_at_once(start_service: Callable[..., Service]) -> None:
    service = start_service()
    began = service.scalar("SELECT max(term) FROM leaders")
    batch = service.client.submit_many(sweep_jobs(SEED + 1, 400))
    for share in (0.1, 0.4, 0.7):
        service.wait_progress(batch, share)
        stop(service, "dispatcher")
    finish(service, batch)
    assert set(ends(service, "dispatcher")) == {"exit status 0"}
    assert service.scalar("SELECT max(attempt) FROM jobs") == 1, "no job was assigned twice"
    assert service.scalar("SELECT max(term) FROM leaders") == began + 3


def test_an_api_answers_what_it_has_begun(start_service: Callable[..., Service]) -> None:
    service = start_service()
    batches, faults = [], []

    def submit(number: int) -> None:
        try:
            batches.append(service.client.submit_many(sweep_jobs(SEED + number, 40)))
            job = service.client.submit("planet=", max_tokens=8)
            job.result(timeout=120)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=submit, args=(number,)) for number in range(12)]
    for number, thread in enumerate(threads):
        thread.start()
        if number % 4 == 3:
            stop(service, "api")
    for thread in threads:
        thread.join(180)
    assert faults == []
    assert set(ends(service, "api")) == {"exit status 0"}
    finish(service, *batches)
    assert service.scalar("SELECT count(*) FROM jobs") == 12 * 41
    assert service.scalar("SELECT count(*) FROM batches") == 24


def test_the_tasks_stop_between_two_chunks_and_go_on_there(start_service: Callable[..., Service]) -> None:
    service = start_service(MEDLEY_FORWARD="null", MEDLEY_MAX_NUM_SEQS="64")
    prompts = [f"prompt {number}" for number in range(4_000)]
    sweep = service.client.sweep("nightly", prompts, adapters=["acme/*"], include_base=True, max_tokens=2)
    for _ in range(3):
        stop(service, "tasks")
    results = {result.id for result in sweep.results(timeout=300)}
    assert len(results) == 4_000 * 7
    assert set(ends(service, "tasks")) == {"exit status 0"}
    finish(service)
