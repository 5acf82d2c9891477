"""Results as tables and files, downloads that go on where they were cut off, and bars of what is waited for."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from api_server import Api
from commands import Medley

from medley.client import Batch, Client, Result
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState


@pytest.fixture
def run(api: Api, tenant: str) -> Medley:
    return Medley(api.url, api.key(tenant))


def submit(client: Client, num_jobs: int) -> Batch:
    return client.submit_many([{"prompt": "p", "custom_id": f"c{i}"} for i in range(num_jobs)], name="many")


def read(path: Path) -> list[Result]:
    return [msgspec.json.decode(line, type=Result) for line in path.read_bytes().splitlines()]


def test_results_become_tables_of_the_latest_attempts(api: Api, client: Client) -> None:
    batch = submit(client, 4)
    api.finish(batch.id, 3, text="an answer")
    broken = JobError(code=ErrorCode.ENGINE, message="it broke")
    api.finish(batch.id, 1, state=JobState.FAILED, text=None, error=broken)
    batch.retry()
    api.finish(batch.id, text="at last")
    table = batch.to_arrow(include_tokens=True)
    assert table.column("seq").to_pylist() == [1, 2, 3, 5]
    assert table.column("token_ids").to_pylist() == [[7, 7]] * 4
    assert batch.to_arrow(latest=False).column("error_code").to_pylist() == [None, None, None, "engine", None]
    frame = batch.to_pandas()
    assert list(frame["text"]) == ["an answer"] * 3 + ["at last"]
    assert frame["finished_at"].dt.tz is not None
    assert client.submit_many(["p"]).to_arrow(follow=False).num_rows == 0


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_download_that_is_cut_off_goes_on_where_it_was(
    api: Api, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    batch, path = submit(client, 45), tmp_path / f"r{suffix}"
    api.finish(batch.id)
    asked: list[int] = []
    page = batch.page

    def cut(**options: Any) -> Any:
        asked.append(options["after"])
        if len(asked) == 4:
            raise ConnectionResetError
        return page(**{"limit": 10} | options)

    monkeypatch.setattr(batch, "page", cut)
    with pytest.raises(ConnectionResetError):
        batch.download(path)
    partial = path if suffix == ".jsonl" else tmp_path / "r.parquet.part"
    assert path.exists() == (suffix == ".jsonl")
    assert [r.seq for r in read(partial)] == list(range(1, 31))
    with partial.open("ab") as file:
        file.write(b'{"seq":31,"id":"jo')  # a line that was being written
    assert batch.download(path) == 45
    assert asked[4:] == [29, 30, 40], "nothing is read twice, but for the look at whose results these are"
    seqs = [r.seq for r in read(path)] if suffix == ".jsonl" else pq.read_table(path).column("seq").to_pylist()
    assert seqs == list(range(1, 46))
    assert {p.name for p in tmp_path.iterdir()} == {path.name}


def test_a_file_of_something_else_is_left_as_it_is(api: Api, client: Client, run: Medley, tmp_path: Path) -> None:
    first, second = submit(client, 2), submit(client, 2)
    for batch in (first, second):
        api.finish(batch.id)
    path = tmp_path / "r.jsonl"
    assert first.download(path) == first.download(path) == 2
    with pytest.raises(ValueError, match="another batch"):
        second.download(path)
    done = run("results", second.id, "--output", path)
    assert (done.returncode, "another batch" in done.stderr) == (2, True)
    assert {r.id for r in read(path)} == {r.id for r in first.results()}
    for notes in ("notes\n", "notes", '{"seq": 1}\nnotes'):
        (tmp_path / "n.jsonl").write_text(notes)
        with pytest.raises(ValueError, match="something else"):
            first.download(tmp_path / "n.jsonl")
        assert (tmp_path / "n.jsonl").read_text() == notes
    with pytest.raises(ValueError, match=r"r\.csv"):
        first.download(tmp_path / "r.csv")


def test_who_waits_sees_how_far_it_is(
    api: Api, client: Client, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    batch = submit(client, 3)
    api.finish(batch.id)
    assert batch.wait(progress=True).counts.succeeded == 3
    assert capsys.readouterr().err.startswith("many: 3/3 (")
    batch.download(tmp_path / "r.jsonl", progress=True)
    assert capsys.readouterr().err.startswith("many: 3/3 (")
    batch.wait()
    assert capsys.readouterr().err == ""


def test_a_notebook_has_a_bar_that_moves_in_its_place(
    api: Api, client: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """IPython as a kernel loads it: `display` gives a handle, by which what is shown is shown anew."""
    shown: list[str] = []

    def display(shown_object: Any, *, display_id: bool) -> Any:
        assert display_id
        shown.append(shown_object._repr_html_())
        return SimpleNamespace(update=lambda again: shown.append(again._repr_html_()))

    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))  # type: ignore[arg-type]
    batch = client.submit_many(["p"] * 2, name="<b>")
    api.finish(batch.id)
    batch.wait(progress=True)
    assert shown[0].startswith('<progress value="0" max="2"></progress> &lt;b&gt;: 0/2')
    assert shown[-1].startswith('<progress value="2" max="2"></progress> &lt;b&gt;: 2/2')
    assert capsys.readouterr().err == ""
