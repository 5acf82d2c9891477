"""The commands of a tenant with pipes around them: what they print, as lines and as JSON, and how they end."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from api_server import ADAPTERS, Api
from commands import Medley
from timing import keeps_to, timed
from working import Working

from medley.client import Client
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState


@pytest.fixture
def run(api: Api, tenant: str) -> Medley:
    return Medley(api.url, api.key(tenant))


def test_a_prompt_is_submitted_and_answered(api: Api, run: Medley) -> None:
    with Working(api, text="the answer"):
        assert run.lines("submit", "hello", "--max-tokens", "4", "--stop", "x") == ["the answer"]
        done = run.process("submit", "hello", "--priority", "high", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    job = msgspec.json.decode(done.stdout)
    assert (job["state"], job["result"]["text"]) == ("succeeded", "the answer")


def test_a_job_is_submitted_shown_and_cancelled_by_its_id(run: Medley) -> None:
    [job_id] = run.lines("submit", "hello", "--no-wait")
    assert run.lines("status", job_id) == [f"{job_id}\tqueued"]
    assert run.lines("cancel", job_id) == [f"{job_id}\tcancelled"]
    [job] = run.json("status", job_id)
    assert job["state"] == "cancelled"  # type: ignore[index]


def test_a_job_without_a_result_ends_the_command_with_1(api: Api, run: Medley) -> None:
    with Working(api, state=JobState.FAILED, text=None, error=JobError(code=ErrorCode.ENGINE, message="it broke")):
        done = run("submit", "hello", "--json")
    assert done.returncode == 1
    assert msgspec.json.decode(done.stdout)["error"]["code"] == "engine"
    assert "it broke" in msgspec.json.decode(done.stderr)["error"]["message"]


def test_a_file_is_submitted_followed_and_read(api: Api, run: Medley, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text("".join(f'{{"prompt": "p", "custom_id": "c{i}"}}\n' for i in range(3)))
    with Working(api, text="tab\there\n\x1b[31m"):
        done = run.process("submit", "--file", file, "--name", "mine", "--wait")
    assert done.returncode == 0, done
    batch_id, state, counts = done.stdout.strip().split("\t")
    assert state == "finished"
    assert counts.startswith("3/3 ended: 3 succeeded, 0 failed")
    assert "mine: 3/3" in done.stderr
    lines = run.lines("results", batch_id)
    assert sorted(line.split("\t")[1] for line in lines) == ["c0", "c1", "c2"]
    assert {tuple(line.split("\t")[2:]) for line in lines} == {("(base)", "succeeded", "tab\\there\\n\\x1b[31m")}
    assert [r["seq"] for r in run.json("results", batch_id, "--after", "1", "--no-follow")] == [2, 3]  # type: ignore[index]
    output = tmp_path / "r.parquet"
    assert run.lines("results", batch_id, "--output", output) == [f"3 results in {output}"]
    assert pq.read_table(output).num_rows == 3
    [header, row] = run.lines("status")
    assert header.split("\t")[:4] == ["id", "name", "state", "done"]
    assert row.split("\t")[:4] == [batch_id, "mine", "finished", "3"]
    [shown] = run.json("status")
    assert shown["id"] == batch_id  # type: ignore[index]


def test_a_bad_file_lists_its_lines(run: Medley, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"prompt": "a"}\n{"promt": "b"}\nnonsense\n')
    done = run("submit", "--file", file)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "line 2: promt" in done.stderr
    assert "line 3: " in done.stderr
    error: dict[str, Any] = msgspec.json.decode(run("submit", "--file", file, "--json").stderr)["error"]
    assert {fault["line"] for fault in error["faults"]} == {2, 3}
    assert error["code"] == "invalid_request"


def test_adapters_are_added_listed_shown_and_deleted(run: Medley, tmp_path: Path, tenant: str) -> None:
    names = sorted(path.name for path in ADAPTERS.iterdir())[:3]
    for name in names:
        shutil.copytree(ADAPTERS / name, tmp_path / name)
    done = run.process("adapters", "add", tmp_path, "--parallel", "2")
    assert (done.returncode, done.stdout) == (0, "3 added, 0 skipped, 0 refused\n")
    assert "adapters: 3/3" in done.stderr
    (tmp_path / names[2] / "adapter_config.json").write_text("{}")
    done = run("adapters", "add", tmp_path, "--json")
    assert done.returncode == 1
    summary = msgspec.json.decode(done.stdout)
    assert (summary["added"], summary["skipped"], list(summary["errors"])) == (0, 2, [names[2]])
    [shown] = run.lines("adapters", "add", tmp_path / names[0], "--name", "other")
    assert shown.startswith(f"{tenant}/other@rev_")
    header, *rows = run.lines("adapters", "list")
    assert header.startswith("name\tstate\trank")
    assert [row.split("\t")[0] for row in rows] == [f"{tenant}/{name}" for name in sorted([*names, "other"])]
    assert run.lines("adapters", "show", "other")[0] == "name: other"
    assert run.json("adapters", "delete", "other") == [{"deleted": "other"}]
    done = run("adapters", "show", "other")
    assert (done.returncode, done.stderr) == (1, "error: there is no adapter 'other' (404 not_found)\n")


def test_an_adapter_is_shared_and_unshared(api: Api, run: Medley, client: Client, tenant: str) -> None:
    friend = Medley(api.url, api.key(f"friend-of-{tenant}"))
    added = client.adapters.add("mine", ADAPTERS / "add")
    assert run.lines("adapters", "share", "mine", f"friend-of-{tenant}") == [f"mine is shared with friend-of-{tenant}"]
    assert run.lines("adapters", "grants", "mine") == ["tenant\trevision", f"friend-of-{tenant}\t*"]
    header, row = friend.lines("adapters", "list", "--shared")
    assert (header.split("\t")[0], row.split("\t")[0]) == ("name", f"{tenant}/mine")
    assert friend.lines("adapters", "show", f"{tenant}/mine")[2] == f"revision: {added.revision}"
    run.lines("adapters", "unshare", "mine", f"friend-of-{tenant}")
    assert friend("adapters", "show", f"{tenant}/mine").returncode == 1
    assert run("adapters", "share", "mine", "nobody").returncode == 1


def test_a_sweep_is_followed_to_its_report_and_resumed(api: Api, client: Client, run: Medley, tmp_path: Path) -> None:
    name = next(ADAPTERS.iterdir()).name
    client.adapters.add(name, ADAPTERS / name)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1=", "expected": "2"}\n{"prompt": "2+2=", "expected": "4"}\n"a text"\n')
    options = ("--adapters", "*", "--include-base", "--max-tokens", "4")
    assert run("sweep", "math", prompts, *options, "--no-wait").returncode == 0
    with Working(api, text="4"):
        done = run.process("sweep", "math", prompts, *options)
    assert done.returncode == 0, done
    assert "math: 6/6" in done.stderr
    header, own, base = (line.split("\t") for line in done.stdout.splitlines())
    assert header[:3] == ["adapter", "correct", "accuracy"]
    assert own[:3] == [name, "1/2", "50.0%"]
    assert base[:3] == ["(base)", "1/2", "50.0%"]
    [first, _] = run.json("sweep", "math", "--report")
    assert first["correct"] == 1  # type: ignore[index]
    assert "6/6 ended" in run.lines("status", "math")[0]
    assert len(run.lines("results", "math")) == 6
    done = run("sweep", "math", prompts, "--adapters", "*")
    assert (done.returncode, done.stdout) == (1, "")
    assert "another definition" in done.stderr


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["submit"], "give either a PROMPT or --file"),
        (["submit", "x", "--name", "n"], "a single prompt has none"),
        (["results", "batch_1", "--output", "r.csv"], ".jsonl or .parquet"),
        (["sweep", "n", "--adapters", "*"], "wants a file of PROMPTS"),
        (["sweep", "n", __file__], "which adapters?"),
        (["sweep", "n", __file__, "--adapters", "*"], "line 1 of test_cli_commands.py"),
        (["sweep", "n", __file__, "--include-base", "--seeds", "1,x"], "whole numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_command_line_ends_with_2_and_says_why(args: list[str], why: str) -> None:
    done = Medley("http://127.0.0.1:1", "mk_x")(*args)
    assert done.returncode == 2
    assert why in done.stderr
    assert "Traceback" not in done.stderr


def test_a_missing_key_or_a_url_that_is_none_says_what_to_give() -> None:
    done = Medley(None, None)("status")
    assert done.returncode == 2
    assert "give --api-key or set MEDLEY_API_KEY" in done.stderr
    assert Medley("http://a:b:c", "mk_x")("status").returncode == 2


def test_without_a_server_a_command_says_so_in_one_line_and_soon() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        run = Medley(f"http://127.0.0.1:{unheard.getsockname()[1]}", "mk_x")

        def attempt() -> float:
            with timed() as took:
                done = run.process("status")
            assert (done.returncode, done.stdout) == (1, "")
            assert done.stderr.startswith("error: no answer from http://127.0.0.1:")
            assert len(done.stderr.splitlines()) == 1
            return took.seconds

        keeps_to(10, attempt)


def test_a_reader_that_goes_early_ends_the_command_quietly(api: Api, client: Client, run: Medley) -> None:
    batch = client.submit_many(["p"] * 3_000)
    api.finish(batch.id)
    script = f"set -o pipefail; '{sys.executable}' -m medley results {batch.id} --json | head -1"
    done = subprocess.run(["bash", "-c", script], env=run.environ(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert msgspec.json.decode(done.stdout)["seq"] == 1
