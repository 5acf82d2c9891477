"""Logs: one line an event, libraries' too, and never a tenant's text."""

from __future__ import annotations

import json
import subprocess
import sys

_CODE = """
import logging, sys, structlog
from medley import logs
logs.configure("api", format=sys.argv[1])
log = structlog.get_logger()
log.info("job.claimed", worker="worker_01", num_jobs=3, prompt="a secret text", token_ids=[1, 2])
logging.getLogger("a.library").warning("hello %s", "there")
logging.getLogger("celery.worker").info("not said")
log.debug("not.said")
try:
    raise ValueError("bad")
except ValueError:
    log.exception("task.failed", id=7)
"""


def _said(format_: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", _CODE, format_], capture_output=True, text=True, check=True)
    assert "secret" not in done.stdout
    assert "not said" not in done.stdout
    assert "not.said" not in done.stdout
    return done.stdout.splitlines()


def test_an_event_is_one_line_with_its_time_process_name_and_ids() -> None:
    lines = [line.partition(" ")[2] for line in _said("line")]
    assert lines[0] == ("api job.claimed worker=worker_01 num_jobs=3 prompt='<13 dropped>' token_ids='<2 dropped>'")
    assert lines[1] == "api WARNING a.library message='hello there'"
    assert lines[2] == "api ERROR task.failed id=7"


def test_under_a_supervisor_the_name_is_left_out() -> None:
    assert _said("bare")[0].split()[1] == "job.claimed"


def test_json_lines_hold_the_same_and_the_traceback() -> None:
    first, second, third = (json.loads(line) for line in _said("json"))
    assert (first["process"], first["event"], first["num_jobs"]) == ("api", "job.claimed", 3)
    assert (second["event"], second["message"]) == ("a.library", "hello there")
    assert "ValueError: bad" in third["exception"]
