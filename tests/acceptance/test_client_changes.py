"""The client and the commands on what changes: retries, deadlines, extensions, diffs; and on webhooks and usage."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from api_server import ADAPTERS, Api
from commands import Medley
from receiver import Receiver, receiving
from working import Working

import medley
from medley.client import Client
from medley.db import webhooks
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState
from medley.tasks.deliver import Deliverer

WAIT_S = 20.0
BROKEN = {
    "state": JobState.FAILED,
    "text": None,
    "error": JobError(code=ErrorCode.ENGINE, message="it broke"),
}


@pytest.fixture
def run(api: Api, tenant: str) -> Medley:
    return Medley(api.url, api.key(tenant))


@pytest.fixture
def adapters(client: Client) -> list[str]:
    names = sorted(path.name for path in ADAPTERS.iterdir())[:2]
    for name in names:
        client.adapters.add(name, ADAPTERS / name)
    return names


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def test_failed_jobs_are_retried_and_the_results_go_on(api: Api, client: Client, run: Medley) -> None:
    batch = client.submit_many([{"prompt": "p", "custom_id": f"c{i}"} for i in range(4)], max_tokens=4)
    api.finish(batch.id, 2, **BROKEN)
    api.finish(batch.id)
    assert batch.wait(timeout=WAIT_S).counts.failed == 2
    first = list(batch.results())
    status = batch.retry(codes="retryable")
    assert (status.counts.retried, status.counts.failed, status.has_finished) == (2, 0, False)
    assert not batch.has_finished()
    with Working(api):
        rest = list(batch.results(after=first[-1].seq, timeout=WAIT_S))
    assert {r.retry_of for r in rest} == {r.id for r in first if r.error is not None}
    latest = list(client.results(batch.id, latest=True))
    assert sorted(r.custom_id or "" for r in latest) == ["c0", "c1", "c2", "c3"]
    assert all(r.state == "succeeded" for r in latest)
    assert batch.wait(timeout=WAIT_S).counts.succeeded == 4
    assert len(run.lines("results", batch.id)) == 6
    assert len(run.lines("results", batch.id, "--latest")) == 4
    assert client.job(first[0].id).status.retried_by is not None


def test_the_commands_pause_resume_update_and_retry(api: Api, client: Client, run: Medley) -> None:
    batch = client.submit_many(["p"] * 3)
    assert run.lines("pause", batch.id) == [f"{batch.id}\tpaused"]
    assert run.lines("resume", batch.id) == [f"{batch.id}\trunning"]
    assert run.lines("update", batch.id, "--priority", "high", "--deadline", "2126-01-01T00:00+00:00") == [
        f"{batch.id}\thigh\tdeadline: 2126-01-01T00:00:00+00:00"
    ]
    assert run.lines("update", batch.id, "--deadline", "none") == [f"{batch.id}\thigh\tdeadline: -"]
    later = datetime.now(UTC) + timedelta(days=1)
    assert batch.update(deadline_at=later).deadline_at == later
    assert batch.update(priority="low").deadline_at == later
    api.finish(batch.id, 1, **BROKEN)
    run.lines("cancel", batch.id)
    shown = run.lines("status", batch.id, "--adapters")
    assert shown[1].split("\t")[:4] == ["(base)", "3/3", "0", "engine: 1"]
    [line] = run.lines("retry", batch.id, "--code", "prompt_too_long")
    assert "retried" not in line
    [line] = run.lines("retry", batch.id, "--state", "failed", "--state", "cancelled")
    assert "0/3 ended" in line
    assert "; 3 retried" in line
    with Working(api):
        assert run.process("retry", batch.id, "--wait").returncode == 0
    assert client.batch(batch.id).status.counts.succeeded == 3
    (adapter,) = client.batch(batch.id).adapters()
    assert (adapter.adapter, adapter.counts.succeeded, adapter.expected_at) == (None, 3, None)
    for args in (("update", "x"), ("retry", "x", "--code", "engine", "--retryable"), ("status", "--adapters")):
        assert run(*args).returncode == 2
    assert run("update", batch.id, "--deadline", "2026-01-01").returncode == 2


def test_a_sweep_is_extended_and_compared(
    api: Api, client: Client, run: Medley, adapters: list[str], tmp_path: Path
) -> None:
    prompts = [{"prompt": f"p{i}", "expected": "yes", "custom_id": f"c{i}"} for i in range(4)]
    sweep = client.sweep("first", prompts[:2], adapters=adapters[:1], max_tokens=4)
    with Working(api, text="no"):
        sweep.wait(timeout=WAIT_S)
        more = client.sweep("first", prompts[:3], adapters="*", include_base=True, max_tokens=4)
        assert (more.id, more.is_resumed, more.status.counts.total) == (sweep.id, True, 9)
        assert sweep.extend(prompts, seeds=sweep.extend(seeds=[7]) and [7]).counts.total == 24
        assert sweep.wait(timeout=WAIT_S).counts.succeeded == 24
        file = tmp_path / "more.jsonl"
        file.write_text('"another"\n')
        done = run.process("sweep", "extend", "first", file)
        assert done.returncode == 0, done
        assert client.get_sweep("first").status.counts.total == 30
    second = client.sweep("second", prompts, adapters=adapters, max_tokens=4)
    with Working(api, text="yes"):
        second.wait(timeout=WAIT_S)
    found = second.diff(sweep)
    assert [(c.adapter, c.prompts, c.difference, c.wins) for c in found.columns] == [(a, 4, 1.0, 4) for a in adapters]
    assert found.columns[0].p == 0.125
    assert sweep.diff().columns[0].difference == 0.0
    assert sweep.diff(adapter=adapters[0], with_adapter=adapters[1]).columns[0].ties == 4
    header, row, _ = run.lines("sweep", "diff", "second", "first")
    assert header.split("\t")[:3] == ["adapter", "with", "prompts"]
    assert row.split("\t")[:7] == [adapters[0], adapters[0], "4", "100.0%", "0.0%", "+100.0%", "+100.0% to +100.0%"]
    assert run.json("sweep", "diff", "second", "first", "--adapter", adapters[0])[0]["ties"] == 0  # type: ignore[index]
    with pytest.raises(medley.Conflict, match="no base"):
        second.diff()
    assert run("sweep", "extend", "first").returncode == 2
    assert "run" in "".join(run.lines("sweep", "--help"))


def test_webhooks_are_registered_tried_and_verified(api: Api, client: Client, run: Medley, receiver: Receiver) -> None:
    webhook = client.webhooks.add(receiver.url, ["batch.finished"], description="mine")
    assert webhook.secret is not None
    batch = client.submit_many(["p"])
    api.finish(batch.id)
    deliverer = Deliverer(api.ledger.work, allow_loopback=True)
    with api.ledger.working() as conn:
        due = [
            d for d in webhooks.read_due(conn) if d.hex in {m.id[4:] for m in client.webhooks.deliveries(webhook.id)}
        ]
    assert len(due) == 1
    assert deliverer.deliver(due[0]) == UUID(webhook.id[3:])
    deliverer.close()
    (message,) = receiver.received
    medley.verify_webhook(message.body, message.headers, webhook.secret)
    with pytest.raises(medley.BadSignature):
        medley.verify_webhook(message.body + b" ", message.headers, webhook.secret)
    assert client.webhooks.deliveries(webhook.id)[0].state == "delivered"
    rotated = client.webhooks.rotate(webhook.id, overlap_s=60)
    assert rotated.secret not in (None, webhook.secret)
    assert client.webhooks.update(webhook.id, enabled=False).state == "disabled"
    assert client.webhooks.update(webhook.id, enabled=True, description=None).description is None
    client.webhooks.delete(webhook.id)
    with pytest.raises(medley.NotFound):
        client.webhooks.get(webhook.id)

    [line] = run.lines("webhooks", "add", receiver.url, "--failed-jobs", "5")
    made, secret = line.split("\t")
    assert secret.startswith("whsec_")
    _, row = run.lines("webhooks", "list")
    assert row.split("\t") == [made, "enabled", "batch.finished,sweep.finished,batch.failing", "0", receiver.url]
    assert run.lines("webhooks", "show", made)[0] == f"id: {made}"
    assert secret not in "".join(run.lines("webhooks", "show", made))
    assert run.lines("webhooks", "rotate", made) != [secret]
    [message_id] = run.lines("webhooks", "ping", made)
    assert run.lines("webhooks", "deliveries", made)[1].split("\t")[:3] == [message_id, "ping", "pending"]
    assert "disabled: you disabled it" in run.lines("webhooks", "update", made, "--disable")[0]
    assert run("webhooks", "update", made).returncode == 2
    assert run.json("webhooks", "delete", made) == [{"deleted": made}]
    assert run("webhooks", "add", "http://10.0.0.1/").returncode == 1


def test_usage_is_shown_by_day_and_adapter(api: Api, client: Client, run: Medley, adapters: list[str]) -> None:
    batch = client.submit_many([{"prompt": "p"}, {"prompt": "p", "adapter": adapters[0]}])
    api.finish(batch.id)
    report = client.usage()
    today = datetime.now(UTC).date()
    assert report.total.num_jobs == 2
    assert [(row.day, row.completion_tokens) for row in report.rows] == [(today, 4)]
    assert [row.adapter for row in client.usage(today, today, by="adapter").rows] == [adapters[0], None]
    lines = run.lines("usage", "--by", "adapter", "--from", today.isoformat())
    assert lines == [
        "adapter\tjobs\tprompt tokens\tcompletion tokens",
        f"{adapters[0]}\t1\t3\t2",
        "(base)\t1\t3\t2",
        "total\t2\t6\t4",
    ]
    assert run.json("usage")[0]["total"]["num_jobs"] == 2  # type: ignore[index]
