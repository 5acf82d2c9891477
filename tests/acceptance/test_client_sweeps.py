"""The client on sweeps: declared, resumed, reported, and their results as files."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest
from api_server import ADAPTERS, Api
from working import Working, expand

import medley
from medley.client import Client, Result
from medley.client.files import write_jsonl, write_parquet
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState

WAIT_S = 20.0
PROMPTS, EXPECTED = ["1+1=", "2+2="], ["2", "4"]


@pytest.fixture
def adapters(client: Client) -> list[str]:
    names = sorted(path.name for path in ADAPTERS.iterdir())[:2]
    for name in names:
        client.adapters.add(name, ADAPTERS / name)
    return names


def test_a_sweep_runs_to_its_report(api: Api, client: Client, tenant: str, adapters: list[str]) -> None:
    sweep = client.sweep(
        "arithmetic", PROMPTS, adapters=[f"{tenant}/*"], expected=EXPECTED, include_base=True, max_tokens=4
    )
    assert (sweep.name, sweep.is_resumed, sweep.status.counts.total) == ("arithmetic", False, 6)
    with Working(api, text=" 4\n"):
        assert sweep.wait(timeout=WAIT_S).counts.succeeded == 6
    results = list(sweep.results())
    assert {(r.prompt_idx, r.adapter) for r in results} == {(i, a) for i in (0, 1) for a in [*adapters, None]}
    assert len({r.seed for r in results}) == 1
    report = sweep.report()
    assert [c.adapter for c in report.adapters] == adapters
    assert report.base is not None
    for column in report.columns:
        assert (column.ended, column.scored, column.correct, column.accuracy) == (2, 2, 1, 0.5)
        assert (column.base_scored, column.base_correct, column.base_accuracy) == (2, 1, 0.5)
        assert column.low is not None
        assert column.high is not None
        assert 0 < column.low < 0.5 < column.high < 1
    assert report.sweep.id == sweep.id == client.find("arithmetic").id == client.find(sweep.id).id
    assert client.batches()[0].id == sweep.id


def test_the_same_sweep_again_goes_on_and_another_of_that_name_is_a_conflict(
    api: Api, client: Client, adapters: list[str]
) -> None:
    first = client.sweep("again", PROMPTS, adapters=adapters, expected=EXPECTED)
    expand(api)
    api.finish(first.id, 1, text="2")
    second = client.sweep("again", PROMPTS, adapters=adapters, expected=EXPECTED)
    assert (second.is_resumed, second.id, second.status.counts.ended) == (True, first.id, 1)
    with Working(api, text="2"):
        assert len(list(client.results("again", timeout=WAIT_S))) == 4
    with pytest.raises(medley.Conflict, match="another definition"):
        client.sweep("again", PROMPTS, adapters=adapters)
    assert client.get_sweep("again").report().columns[0].correct == 1


def test_a_prompt_may_concern_one_adapter_and_the_base_alone(api: Api, client: Client, adapters: list[str]) -> None:
    rows = [{"prompt": "x", "expected": "y", "adapter": a, "custom_id": f"id-{a}"} for a in adapters]
    sweep = client.sweep("own", rows, adapters="*", include_base=True, seeds=[1, 2])
    assert sweep.status.counts.total == 8
    assert client.cancel("own").state in ("cancelling", "finished")
    with Working(api):
        assert sweep.wait(timeout=WAIT_S).counts.cancelled == 8
    assert sweep.report().sweep.state == "finished"


def test_what_a_sweep_cannot_be_is_said_before_anything_runs(client: Client, adapters: list[str]) -> None:
    with pytest.raises(ValueError, match="got 1 answers, wanted one for each of 2"):
        client.sweep("bad", PROMPTS, adapters="*", expected=["2"])
    with pytest.raises(medley.InvalidRequest) as raised:
        client.sweep("bad", ["", "x"], adapters=["nobody*", *adapters], top_p=3)
    assert {"prompts[0].prompt", "top_p"} <= {f.field for f in raised.value.faults}
    with pytest.raises(medley.InvalidRequest, match="matches an adapter"):
        client.sweep("bad", PROMPTS, adapters=["nobody*", *adapters])
    with pytest.raises(medley.NotFound, match="bad"):
        client.get_sweep("bad")


def test_results_as_files_hold_what_the_results_hold(api: Api, client: Client, tmp_path: Path) -> None:
    batch = client.submit_many([{"prompt": "p", "custom_id": f"é{i}"} for i in range(5)])
    api.finish(batch.id, 3, text='line\n"two" ☃')
    error = JobError(code=ErrorCode.NUMERICAL, message="NaN")
    api.finish(batch.id, state=JobState.FAILED, text=None, error=error)
    results = list(batch.results(timeout=WAIT_S))
    assert write_jsonl(tmp_path / "r.jsonl", batch.results()) == 5
    lines = (tmp_path / "r.jsonl").read_bytes().splitlines()
    assert [msgspec.json.decode(line, type=Result) for line in lines] == results
    assert write_parquet(tmp_path / "r.parquet", batch.results()) == 5
    rows = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert [row["seq"] for row in rows] == [1, 2, 3, 4, 5]
    for row, result in zip(rows, results, strict=True):
        for name in ("id", "state", "custom_id", "adapter", "text", "finish_reason", "finished_at", "seed"):
            assert row[name] == getattr(result, name)
        assert row["completion_tokens"] == result.usage.completion_tokens
        assert row["error_code"] == (result.error and result.error.code)
    assert write_parquet(tmp_path / "none.parquet", []) == 0
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0


def test_a_long_file_is_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medley.client.files.ROWS", 3)
    results = [Result(seq=i, id=f"job_{i}", state="succeeded") for i in range(1, 8)]
    assert write_parquet(tmp_path / "r.parquet", iter(results)) == 7
    file = pq.ParquetFile(tmp_path / "r.parquet")
    assert file.num_row_groups == 3
    file.close()
