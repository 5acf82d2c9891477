"""The shell as a real process with a real engine, PostgreSQL and Redis; the test claims as the dispatcher does.

One shell serves all tests of this file, in any order; those that end a shell are in test_shell_ends.py.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from shells import BOS, EOS, ShellProcess, Site, make_model
from tokenizers import pre_tokenizers

from medley.db import cancels, flags
from medley.db.workers import WorkerState
from medley.spec.ids import uuid7

LONG = {"prompt": "a long answer", "max_tokens": 3_000}  # some seconds of work
ENDLESS = {"prompt": "a book", "max_tokens": 20_000}  # more than any machine does while a test runs


@pytest.fixture(scope="module")
def site(module_database: Any, embedded: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    model = make_model(folder / "model")
    site = Site(module_database, embedded.redis_url, (folder / "store").as_uri(), model, folder)
    yield site
    site.close()


@pytest.fixture(scope="module")
def shell(site: Site) -> ShellProcess:
    return site.start_shell(MEDLEY_LEASE_S="20")  # longer than PostgreSQL takes to start again


def test_jobs_of_text_tokens_base_and_adapters_complete_with_usage(site: Site, shell: ShellProcess) -> None:
    first, second = site.add_revision("first", seed=1), site.add_revision("second", seed=2)
    text, tokens, base, other = site.run(
        shell,
        {"prompt": "abc", "revision": first},
        {"prompt_token_ids": [BOS, 1, 2, 3], "revision": first, "max_tokens": 5},
        {"prompt": "abc"},
        {"prompt": "abc", "revision": second},
    )
    assert [row.state for row in (text, tokens, base, other)] == ["succeeded"] * 4
    assert (text.prompt_tokens, text.completion_tokens, text.finish_reason) == (4, 8, "length")
    assert (tokens.prompt_tokens, tokens.completion_tokens) == (4, 5)
    assert len({tuple(row.token_ids) for row in (text, base, other)}) == 3
    assert len(text.logprobs) == 8


def test_a_revision_that_is_no_more_leaves_the_engine(site: Site, shell: ShellProcess) -> None:
    gone, kept = site.add_revision("gone", seed=7), site.add_revision("kept", seed=8)
    site.run(shell, {"prompt": "abc", "revision": gone}, {"prompt": "abc", "revision": kept})

    def resident() -> set[object]:
        [row] = [row for row in site.workers() if row.id == shell.worker]
        return set(row.resident)

    site.wait_until("both in device memory", lambda: {gone, kept} <= resident())
    site.forget_revision(gone)
    site.wait_until("one of them gone", lambda: gone not in resident())
    assert kept in resident()
    [row] = site.run(shell, {"prompt": "abc", "revision": kept})
    assert row.state == "succeeded"


def test_adapters_that_are_announced_need_not_exist_and_change_no_result(site: Site, shell: ShellProcess) -> None:
    known, next_up = site.add_revision("known", seed=3), site.add_revision("next-up", seed=4)
    (before,) = site.run(shell, {"prompt": "abc", "revision": known})
    site.announce(shell, [next_up, uuid7(), known])
    site.announce(shell, [])
    (after,) = site.run(shell, {"prompt": "abc", "revision": known})
    (new,) = site.run(shell, {"prompt": "abc", "revision": next_up})
    assert after.token_ids == before.token_ids
    assert new.state == "succeeded"
    assert "Traceback" not in shell.log()


def test_a_lost_message_costs_a_second_and_doubled_or_foreign_ids_nothing(site: Site, shell: ShellProcess) -> None:
    batch = site.submit({"prompt": "abc"})
    jobs = site.claim(shell)
    site.wait_results(batch, 1, timeout_s=20.0)
    again = site.submit({"prompt": "abc"}, {"prompt": "abd"})
    ids = site.claim(shell)
    for _ in range(3):
        site.ring(shell, [*ids, *jobs, uuid7()])
    site.wait_results(again, 2)
    assert [(row.state, row.attempt, row.seq) for row in site.results(batch)] == [("succeeded", 1, 1)]
    assert sorted(row.seq for row in site.results(again)) == [1, 2]


def test_a_stop_string_and_an_end_token_cut_the_output_and_its_usage(site: Site, shell: ShellProcess) -> None:
    letter = site.run(shell, {"prompt": "abc", "logit_bias": {"64": 100}, "max_tokens": 4})[0].text[0]
    stopped, late, ended, plain = site.run(
        shell,
        {"prompt": "abc", "logit_bias": {"64": 100}, "max_tokens": 30, "stop": [letter * 3]},
        {"prompt": "abc", "logit_bias": {"64": 100}, "max_tokens": 30, "stop": [letter * 3], "min_tokens": 6},
        {"prompt": "abc", "logit_bias": {str(EOS): 100}, "ignore_eos": False},
        {"prompt": "abc", "logit_bias": {"64": 100}, "max_tokens": 4, "stop": ["never"]},
    )
    assert (stopped.text, stopped.finish_reason, stopped.completion_tokens) == ("", "stop", 3)
    assert stopped.token_ids == [64] * 3
    assert len(stopped.logprobs) == 3
    assert (late.text, late.finish_reason, late.completion_tokens) == (letter * 4, "stop", 7)
    assert (ended.text, ended.finish_reason, ended.token_ids) == ("", "stop", [EOS])
    assert (plain.text, plain.finish_reason) == (letter * 4, "length")


def test_what_cannot_run_fails_with_its_code_and_the_others_finish(site: Site, shell: ShellProcess) -> None:
    missing = site.add_revision("missing", seed=0, digest="0" * 64)
    rows = site.run(
        shell,
        {"prompt": "x" * 40_000},
        {"prompt_token_ids": [1, 999]},
        {"prompt": "abc", "revision": missing},
        {"prompt": "abc", "written_by_another_version": 1},
        {"prompt": "abc"},
    )
    codes = ["prompt_too_long", "invalid_token", "adapter_unavailable", "engine", None]
    assert [row.error_code for row in rows] == codes
    assert [row.state for row in rows] == ["failed"] * 4 + ["succeeded"]
    assert "40001 tokens" in rows[0].error_message


def test_a_continuation_is_scored_as_the_same_tokens_are_in_a_prompt(site: Site, shell: ShellProcess) -> None:
    first = site.add_revision("scored", seed=5)
    whole = {"prompt": "abc def", "max_tokens": 0, "prompt_logprobs": 2, "revision": first}
    echo, score, blank, ids, mixed, plain = site.run(
        shell,
        whole,
        {"prompt": "abc", "continuation": " def", "top_logprobs": 2, "revision": first},
        {"prompt": "abc ", "continuation": "def", "revision": first},
        {"prompt_token_ids": echo_ids("abc"), "continuation_token_ids": echo_ids(" def")[1:], "revision": first},
        {"prompt_token_ids": echo_ids("abc"), "continuation": " def", "revision": first, "prompt_logprobs": 0},
        {"prompt": "abc def", "revision": first},
    )
    assert [row.state for row in (echo, score, blank, ids, mixed, plain)] == ["succeeded"] * 6
    assert (score.finish_reason, score.text, score.completion_tokens, score.prompt_tokens) == ("scored", " def", 0, 8)
    assert (echo.finish_reason, echo.text, echo.token_ids, echo.completion_tokens) == ("length", "", [], 0)
    assert echo.prompt_token_ids == echo_ids("abc def")
    assert score.token_ids == echo.prompt_token_ids[4:]
    for row in (score, blank, ids, mixed):
        assert row.logprobs == echo.prompt_logprobs[3:]
        assert row.is_greedy is False
    assert score.top_token_ids == echo.prompt_top_token_ids[6:]
    assert score.top_logprobs == echo.prompt_top_logprobs[6:]
    assert mixed.prompt_logprobs == echo.prompt_logprobs[:3]
    assert score.prompt_logprobs is None
    assert {plain.top_token_ids, plain.prompt_token_ids, plain.prompt_logprobs, plain.is_greedy} == {None}


def echo_ids(text: str) -> list[int]:
    """As the byte-level tokenizer has it: blanks and letters lie apart in its alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [BOS, *(alphabet.index("\u0120" if char == " " else char) for char in text)]


def test_alternatives_are_cut_with_the_tokens_at_a_stop_string(site: Site, shell: ShellProcess) -> None:
    bias = {"prompt": "abc", "logit_bias": {"64": 100}, "max_tokens": 30, "top_logprobs": 3, "prompt_logprobs": 1}
    letter = site.run(shell, bias | {"max_tokens": 4})[0].text[0]
    stopped, whole = site.run(shell, bias | {"stop": [letter * 3]}, bias | {"stop": ["never"], "max_tokens": 5})
    assert (stopped.text, stopped.token_ids) == ("", [64] * 3)
    assert len(stopped.top_token_ids) == len(stopped.top_logprobs) == 9
    assert len(whole.top_token_ids) == 15
    assert whole.top_token_ids[:9] == stopped.top_token_ids
    assert stopped.prompt_logprobs == whole.prompt_logprobs
    assert len(stopped.prompt_logprobs) == 3


def test_a_text_is_what_was_asked_for_and_a_bad_schema_fails_one_job(site: Site, shell: ShellProcess) -> None:
    guided = {"prompt": "abc", "ignore_eos": False, "temperature": 1.0, "max_tokens": 60}
    rows = site.run(
        shell,
        guided | {"choice": ["yes", "né\n"]},
        guided | {"regex": "[0-9]{3}-x"},
        guided | {"json_schema": '{"enum": ["red", 7]}'},
        guided | {"json_schema": '{"type": "nonsense"}'},
        guided | {"regex": "(a"},
        {"prompt": "abc"},
    )
    assert [row.error_code for row in rows] == [None] * 3 + ["invalid_grammar"] * 2 + [None]
    assert rows[0].text in ("yes", "né\n")
    assert re.fullmatch("[0-9]{3}-x", rows[1].text)
    assert rows[2].text.strip() in ('"red"', "7")
    assert [row.finish_reason for row in rows[:3]] == ["stop"] * 3
    assert "nonsense" in rows[3].error_message


def test_what_has_nothing_to_be_scored_fails_by_name(site: Site, shell: ShellProcess) -> None:
    rows = site.run(
        shell,
        {"prompt_token_ids": [BOS], "continuation_token_ids": [999]},
        {"prompt": "x" * 40_000, "max_tokens": 0, "prompt_logprobs": 0},
    )
    assert [row.error_code for row in rows] == ["invalid_token", "prompt_too_long"]


def test_running_jobs_are_cancelled_and_expired_within_seconds(site: Site, shell: ShellProcess) -> None:
    cancelled, alone = site.submit(ENDLESS, ENDLESS), site.submit(ENDLESS, LONG)
    expiring = site.submit(ENDLESS, deadline_in_s=2.0)
    site.ring(shell, site.claim(shell))
    site.wait_computing(shell)
    site.execute(cancels.cancel_batch, cancelled)
    site.execute(flags.cancel_job, site.jobs(alone)[0].id)
    site.wait_results(cancelled, 2, timeout_s=30)
    site.wait_results(expiring, 1, timeout_s=30)
    site.wait_results(alone, 2)
    assert [row.state for row in site.results(cancelled)] == ["cancelled"] * 2
    assert [row.state for row in site.results(expiring)] == ["expired"]
    assert [row.state for row in site.results(alone)] == ["cancelled", "succeeded"]
    assert {row.completion_tokens for row in site.results(cancelled)} == {0}


def test_a_paused_job_goes_back_with_its_tokens_and_continues_to_the_same_answer(
    site: Site, shell: ShellProcess
) -> None:
    sampled = LONG | {"temperature": 1.0, "seed": 7, "top_logprobs": 2, "prompt_logprobs": 1}
    (whole,) = site.run(shell, sampled)
    batch = site.submit(sampled)
    site.ring(shell, site.claim(shell))
    site.wait_computing(shell)
    site.execute(flags.pause_batch, batch)
    site.wait_until("a job put back", lambda: site.jobs(batch)[0].state == "queued")
    (job,) = site.jobs(batch)
    kept = site.checkpoints()[job.id]
    assert job.is_held
    assert 0 < len(kept) < LONG["max_tokens"]
    assert kept == whole.token_ids[: len(kept)]
    site.execute(flags.resume_batch, batch)
    site.ring(shell, site.claim(shell))
    (row,) = site.wait_results(batch, 1)
    assert (row.token_ids, row.prompt_tokens, row.attempt) == (whole.token_ids, whole.prompt_tokens, 2)
    assert job.id not in site.checkpoints()
    for name in ("top_token_ids", "prompt_token_ids", "prompt_logprobs", "prompt_top_token_ids"):
        assert getattr(row, name) == getattr(whole, name), name
    assert row.top_logprobs == pytest.approx(whole.top_logprobs)


def test_a_drained_worker_gives_its_jobs_back_stops_its_engine_and_can_be_woken(
    site: Site, shell: ShellProcess
) -> None:
    batch = site.submit(LONG, LONG | {"prompt": "another"})
    site.ring(shell, site.claim(shell))
    site.wait_computing(shell)
    engine = shell.engine_pid()
    site.desire(shell, WorkerState.DRAINING)
    site.wait_state(shell, "asleep")
    assert [job.state for job in site.jobs(batch)] == ["queued"] * 2
    assert set(site.checkpoints()) == {job.id for job in site.jobs(batch)}
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)
    assert site.generated(shell) > 0, "totals outlive the engine"
    site.desire(shell, WorkerState.ACTIVE)
    site.wait_state(shell, "active")
    site.claim(shell)
    assert [row.state for row in site.wait_results(batch, 2)] == ["succeeded"] * 2


def test_jobs_rerun_when_their_engine_is_killed(site: Site, shell: ShellProcess) -> None:
    jobs = [LONG | {"prompt": f"job {i}", "max_tokens": 1_200, "seed": i} for i in range(12)]
    batch = site.submit(*jobs)
    site.ring(shell, site.claim(shell))
    site.wait_computing(shell)
    os.kill(shell.engine_pid(), signal.SIGKILL)
    rows = site.wait_results(batch, 12)
    assert [(row.state, row.attempt) for row in rows] == [("succeeded", 1)] * 12
    assert {job.crashes for job in site.jobs(batch)} == {0, 1}
    assert [row.text for row in site.run(shell, *jobs)] == [row.text for row in rows]


def test_jobs_complete_while_redis_is_down(site: Site, shell: ShellProcess, embedded: Any) -> None:
    embedded.stop("redis")
    try:
        batch = site.submit({"prompt": "abc"}, {"prompt": "abd"})
        site.claim(shell)
        site.wait_results(batch, 2, timeout_s=20.0)
        num_lines = shell.log().count("\n")
        later = site.submit({"prompt": "abc"})
        site.claim(shell)
        site.wait_results(later, 1, timeout_s=20.0)
        assert shell.log().count("\n") - num_lines < 5, site.logs()
    finally:
        embedded.start_redis()


def test_results_wait_for_postgres_to_come_back(site: Site, shell: ShellProcess, embedded: Any) -> None:
    batch = site.submit(*[LONG | {"prompt": f"job {i}"} for i in range(8)])
    site.ring(shell, site.claim(shell))
    site.wait_computing(shell)
    embedded.kill("postgres")
    embedded.start_postgres()
    site.reconnect()
    rows = site.wait_results(batch, 8)
    assert [(row.state, row.attempt) for row in rows] == [("succeeded", 1)] * 8
