"""The client through the whole service: every process of `medley up`, the demo's model, real adapters, real answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from api_server import ADAPTERS, MODEL
from commands import Medley
from waiting import wait_until

import medley
from medley.client import Client
from medley.client.files import write_jsonl, write_parquet
from medley.demo.skills import MAX_ANSWER_TOKENS, SKILLS
from medley.local.stack import LocalStack

OURS = SKILLS[:4]
NUM_PROMPTS = 5
WAIT_S = 60.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with LocalStack(tmp_path_factory.mktemp("stack") / "data", model=MODEL) as stack:
        yield stack


def test_a_tenant_does_all_of_the_work_through_the_whole_service(stack: LocalStack, tmp_path: Path) -> None:
    key = stack.add_tenant("acme")
    folder = tmp_path / "adapters"
    folder.mkdir()
    for skill in OURS:
        (folder / skill.name).symlink_to(ADAPTERS / skill.name, target_is_directory=True)
    with Client(stack.url, key) as client:
        assert [u.error for u in client.adapters.add_folder(folder)] == [None] * len(OURS)
        _one_job_answers(client)
        _a_batch_is_followed(client, tmp_path)
        _a_sweep_is_scored_and_resumed(client)
        _what_runs_is_cancelled(client)
        wait_until(lambda: any(worker.stats.get("steps") for worker in client.workers()), "a worker's statistics")
        [worker] = client.workers()
        assert worker.stats["generated_tokens"] > 0
    prompt, answer = OURS[0].held_out(1)[0]
    run = Medley(stack.url, key)
    done = run.process("submit", prompt, "--adapter", f"acme/{OURS[0].name}", "--max-tokens", str(MAX_ANSWER_TOKENS))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{answer}\n", "")
    assert run("status", "skills").stdout.split("\t")[1] == "finished"


def _one_job_answers(client: Client) -> None:
    prompt, answer = OURS[0].held_out(1)[0]
    job = client.submit(prompt, adapter=OURS[0].name, max_tokens=MAX_ANSWER_TOKENS)
    completion = job.result(timeout=WAIT_S)
    assert completion.text == answer
    assert completion.finish_reason == "stop"
    assert completion.usage.prompt_tokens == 1 + len(prompt), "bytes, after the token that begins a text"
    assert len(completion.logprobs) == len(completion.token_ids) == completion.usage.completion_tokens
    uncertain = client.submit("abc=", max_tokens=MAX_ANSWER_TOKENS, ignore_eos=True).result(timeout=WAIT_S)
    assert len(uncertain.logprobs) == MAX_ANSWER_TOKENS
    assert min(uncertain.logprobs) < 0 >= max(uncertain.logprobs)


def _a_batch_is_followed(client: Client, folder: Path) -> None:
    rows = [
        {"prompt": prompt, "adapter": skill.name, "custom_id": f"{skill.name}/{i}"}
        for skill in OURS
        for i, (prompt, _) in enumerate(skill.held_out(NUM_PROMPTS))
    ]
    answers = {f"{s.name}/{i}": answer for s in OURS for i, (_, answer) in enumerate(s.held_out(NUM_PROMPTS))}
    batch = client.submit_many([*rows, {"prompt": "abc=", "custom_id": "base"}], max_tokens=MAX_ANSWER_TOKENS)
    results = {r.custom_id: r.text for r in batch.results(timeout=WAIT_S)}
    assert results.keys() == answers.keys() | {"base"}
    assert sum(results[name] == answer for name, answer in answers.items()) >= 0.8 * len(answers)
    assert write_jsonl(folder / "r.jsonl", batch.results()) == len(results)
    assert write_parquet(folder / "r.parquet", batch.results()) == len(results)
    rows = pq.read_table(folder / "r.parquet", columns=["custom_id", "text"]).to_pylist()
    assert {row["custom_id"]: row["text"] for row in rows} == results


def _a_sweep_is_scored_and_resumed(client: Client) -> None:
    prompts = [
        {"prompt": prompt, "expected": answer, "adapter": skill.name}
        for skill in OURS
        for prompt, answer in skill.held_out(NUM_PROMPTS)
    ]
    options = {"adapters": ["acme/*"], "include_base": True, "max_tokens": MAX_ANSWER_TOKENS}
    sweep = client.sweep("skills", prompts, **options)  # type: ignore[arg-type]
    status = sweep.wait(timeout=WAIT_S)
    assert (status.counts.total, status.counts.succeeded) == (2 * len(prompts), 2 * len(prompts))
    columns = sweep.report().adapters
    assert [c.adapter for c in columns] == sorted(skill.name for skill in OURS)
    correct, correct_base = sum(c.correct for c in columns), sum(c.base_correct for c in columns)
    assert correct >= 0.8 * len(prompts) > 0.2 * len(prompts) >= correct_base
    again = client.sweep("skills", prompts, **options)  # type: ignore[arg-type]
    assert (again.is_resumed, again.id, again.status.has_finished) == (True, sweep.id, True)
    with pytest.raises(medley.Conflict):
        client.sweep("skills", prompts[1:], **options)  # type: ignore[arg-type]


def _what_runs_is_cancelled(client: Client) -> None:
    batch = client.submit_many(["abc="] * 500, max_tokens=200, ignore_eos=True)
    next(batch.results(timeout=WAIT_S))
    batch.cancel()
    counts = batch.wait(timeout=WAIT_S).counts
    assert counts.cancelled > 0
    assert counts.succeeded + counts.cancelled == 500
