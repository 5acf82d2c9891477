"""A job that kills its engine is found by halves and quarantined; the others finish."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from stacks import Service, finish, sweep_jobs

pytestmark = pytest.mark.faults

POISON = "~"  # a byte that no other prompt holds; the failpoint ends the engine in a step that has it
# Four rows a step: the culprit is found in two halvings, and each death costs the start of an engine.
POISONED = {"MEDLEY_ENGINE_FAILPOINT": f"die_on_token={ord(POISON)}", "MEDLEY_MAX_NUM_SEQS": "4"}


@pytest.mark.slow  # test_shell_ends.py has it without the service around; below, the service with an adapter
def test_a_poison_job_is_quarantined_while_the_others_finish(start_service: Callable[..., Service]) -> None:
    service = start_service(**POISONED)
    jobs = sweep_jobs(5, 60)
    jobs[40]["prompt"] = f"abc{POISON}="
    batch = service.client.submit_many(jobs)
    finish(service, batch, timeout_s=180)
    failed = [r for r in batch.results() if r.state != "succeeded"]
    assert [(r.custom_id, r.error.code if r.error else None) for r in failed] == [("40", "job_quarantined")]


def test_a_poison_adapter_is_quarantined_and_its_jobs_fail_with_one_reason(
    start_service: Callable[..., Service],
) -> None:
    service = start_service(**POISONED)
    jobs = sweep_jobs(6, 24)
    poisoned = str(jobs[0].get("adapter") or "caesar-1")
    for job in jobs:
        if job.get("adapter") == poisoned:
            job["prompt"] = f"{POISON}{job['prompt']}"
    batch = service.client.submit_many(jobs)
    finish(service, batch, timeout_s=240)
    by_state: dict[str, set[str | None]] = {}
    for result in batch.results():
        by_state.setdefault(result.state, set()).add(result.adapter)
        if result.error:
            assert result.error.code in ("adapter_quarantined", "job_quarantined")
    assert by_state["failed"] == {poisoned}
    assert poisoned not in by_state["succeeded"]
    assert service.client.adapters.get(poisoned).state == "quarantined"
