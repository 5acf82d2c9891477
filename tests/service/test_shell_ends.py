"""How a shell ends: asked to, frozen past its lease, with an engine that a job kills, with one that cannot start."""

from __future__ import annotations

import signal
from pathlib import Path

from shells import Site

LONG = {"max_tokens": 2_000, "temperature": 1.0}  # seconds of work
POISON = 255  # a token id that no text here has


def test_sigterm_releases_with_checkpoints_and_another_worker_gives_the_undisturbed_answer(site: Site) -> None:
    revision = site.add_revision("one", seed=1)
    jobs = [LONG | {"prompt": f"job {i}", "seed": i, "revision": revision if i % 2 else None} for i in range(6)]
    first = site.start_shell()
    batch = site.submit(*jobs)
    site.ring(first, site.claim(first))
    site.wait_computing(first)
    first.send(signal.SIGTERM)
    assert first.wait(12) == 0, first.log()
    states = [job.state for job in site.jobs(batch)]
    assert set(states) <= {"queued", "succeeded"}
    assert any(site.checkpoints().values())
    assert [row.state for row in site.workers()] == ["gone"]

    second = site.start_shell()
    site.claim(second)
    continued = site.wait_results(batch, 6)
    undisturbed = site.run(second, *jobs)
    assert [row.token_ids for row in continued] == [row.token_ids for row in undisturbed]
    assert [row.prompt_tokens for row in continued] == [row.prompt_tokens for row in undisturbed]
    assert max(row.attempt for row in continued) == 2


def test_a_worker_stopped_past_its_lease_writes_nothing_and_exits(site: Site) -> None:
    shell = site.start_shell()
    batch = site.submit(*[LONG | {"prompt": f"job {i}"} for i in range(4)])
    site.ring(shell, site.claim(shell))
    site.wait_computing(shell)
    shell.send(signal.SIGSTOP)
    site.lapse(shell)
    assert site.reclaim() > 0
    num_before = len(site.results(batch))
    site.wait_idle(shell)  # its engine went on, and has results
    shell.send(signal.SIGCONT)
    assert shell.wait() == 4, shell.log()
    assert "lease.lost" in shell.log()
    assert len(site.results(batch)) == num_before < 4
    assert {job.state for job in site.jobs(batch)} <= {"queued", "succeeded"}


def test_a_job_that_kills_its_engine_is_found_by_halves_and_the_others_finish(site: Site) -> None:
    shell = site.start_shell(MEDLEY_ENGINE_FAILPOINT=f"die_on_token={POISON}")
    rows = site.run(
        shell,
        *[{"prompt_token_ids": [5, 6, 7 + i], "max_tokens": 4} for i in range(3)],
        {"prompt_token_ids": [5, POISON, 7], "max_tokens": 4},
    )
    assert [row.error_code for row in rows] == [None, None, None, "job_quarantined"]
    (guilty,) = [job for job in site.jobs(rows[0].batch_id) if job.state == "failed"]
    assert guilty.crashes == 5  # among 4, among 2, and alone three times
    assert [row.state for row in site.run(shell, {"prompt": "the next one"})] == ["succeeded"]


def test_a_broken_machine_gives_its_jobs_back_as_innocent_and_leaves_saying_why(site: Site) -> None:
    broken = site.start_shell(MEDLEY_ENGINE_FAILPOINT="die_on_step=always")
    batch = site.submit({"prompt": "alone"})  # each death would be this job's alone
    site.ring(broken, site.claim(broken))
    assert broken.wait() == 3, broken.log()
    assert "without any job" in broken.log()
    assert [row.state for row in site.workers()] == ["gone"]
    assert [(job.state, job.crashes, job.step_limit) for job in site.jobs(batch)] == [("queued", 0, None)]

    whole = site.start_shell()
    site.claim(whole)
    assert [row.state for row in site.wait_results(batch, 1)] == ["succeeded"]


def test_a_worker_whose_engine_cannot_start_leaves_and_says_why(site: Site, model: Path) -> None:
    config = model / "config.json"
    whole = config.read_text()
    config.write_text(whole.replace('"llama"', '"mamba"').replace("LlamaForCausalLM", "MambaForCausalLM"))
    try:
        shell = site.start_shell(active=False, MEDLEY_START="active")
        site.wait_until("its end", lambda: shell.process.poll() is not None)
        assert shell.process.returncode == 3, shell.log()
    finally:
        config.write_text(whole)
    assert "engine.useless" in shell.log()
    assert [row.state for row in site.workers()] == ["gone"]
