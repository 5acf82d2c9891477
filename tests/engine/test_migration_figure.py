"""`python -m benchmarks.migration`: a moved job says what it would have said, and one that does not is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import migration
from click.testing import CliRunner, Result

from medley.spec.jobs import Checkpoint


def run(out: Path) -> tuple[Result, dict[str, Any]]:
    args = ["--jobs", "24", "--rows", "16", "--tokens", "24", "--num-adapters", "3", "--out", str(out)]
    done = CliRunner().invoke(migration.main, args)
    (path,) = out.glob("*-migration.json")
    return done, {row["level"]: row for row in json.loads(path.read_text())["rows"]}


def test_on_cpu_no_move_changes_a_token_at_any_level(tmp_path: Path) -> None:
    done, rows = run(tmp_path)
    assert done.exit_code == 0, done.output
    assert set(rows) == {"default", "batch_invariant"}
    for row in rows.values():
        assert (row["jobs"], row["parted"], row["flip_rate"]) == (24, 0, 0.0)
        assert row["moved"] > 12


def test_a_job_that_says_something_else_is_counted_and_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drain = migration._drain

    def damaged(*args: Any) -> Any:
        kept, said = drain(*args)
        number, checkpoint = next((n, c) for n, c in kept.items() if c.token_ids)
        tokens = (*checkpoint.token_ids[:-1], (checkpoint.token_ids[-1] + 1) % 127)
        kept[number] = Checkpoint(token_ids=tokens, logprobs=checkpoint.logprobs)
        return kept, said

    monkeypatch.setattr(migration, "_drain", damaged)
    done, rows = run(tmp_path)
    assert done.exit_code == 1
    assert "moved jobs must say the same" in done.output
    assert rows["default"]["parted"] >= 1
    assert rows["default"]["flip_rate"] > 0
