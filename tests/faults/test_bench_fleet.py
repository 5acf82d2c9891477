"""The fleet benchmark runs on any machine: the whole service, two workers, a load that rises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.faults, pytest.mark.slow]

# A machine that is busy with other things may serve less in the fall than it did alone; what it did is right even so.
OF_SPEED = "workers awake"


def test_every_job_of_a_load_that_rises_and_falls_ends_once_and_counts_are_kept(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--shape", "demo", "--adapters", "24", "--minutes", "0.5", "--window-s", "3"]
    where = ["--scratch", str(tmp_path / "files"), "--data-dir", str(tmp_path / "data"), "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.fleet", *options, *where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    written = list(tmp_path.glob("*-fleet.json"))
    assert len(written) == 1, done.stderr
    figures = json.loads(written[0].read_text())
    faults = [fault for fault in figures["faults"] if not fault.startswith(OF_SPEED)]
    assert not faults, done.stderr
    assert figures["jobs"] == figures["results"] > 0
    assert figures["failed"] == 0
    assert figures["migrated_with_tokens"] > 0
    assert figures["adapters"] == 24
    assert figures["tenants"] == 4
    counts = [count for _, count in figures["gpus_awake"]]
    assert counts[0] == 1, "one worker carries a low load"
    assert max(counts) == 2, "and two a high one"
    assert figures["one_gpu_tok_s"] > 0
    assert figures["two_gpu_tok_s"] > 0
    assert figures["wake_s"] > 0
    assert {"date", "command", "machine", "versions", "series"} <= figures.keys()
