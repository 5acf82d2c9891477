"""Logs: one line an event, libraries' too, and never a tenant's text."""

from __future__ import annotations

import json
import subprocess
import sys

_CODE = """
import logging, sys, structlog
from medley import logs
logs.configure(sys.argv[2], format=sys.argv[1])
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


def _said(format_: str, process: str = "tasks") -> list[str]:
    done = subprocess.run([sys.executable, "-c", _CODE, format_, process], capture_output=True, text=True, check=True)
    assert "secret" not in done.stdout
    assert "not said" not in done.stdout
    assert "not.said" not in done.stdout
    return done.stdout.splitlines()


def test_an_event_is_one_line_with_its_time_process_name_and_ids() -> None:
    lines = [line.partition(" ")[2] for line in _said("line")]
    assert lines[0] == ("tasks job.claimed worker=worker_01 num_jobs=3 prompt='<13 dropped>' token_ids='<2 dropped>'")
    assert lines[1] == "tasks WARNING a.library message='hello there'"
    assert lines[2] == "tasks ERROR task.failed id=7"


def test_under_a_supervisor_the_name_is_left_out() -> None:
    assert _said("bare")[0].split()[1] == "job.claimed"


def test_json_lines_hold_the_same_and_the_traceback() -> None:
    first, second, third = (json.loads(line) for line in _said("json"))
    assert (first["process"], first["event"], first["num_jobs"]) == ("tasks", "job.claimed", 3)
    assert (second["event"], second["message"]) == ("a.library", "hello there")
    assert "ValueError: bad" in third["exception"]


def test_a_message_that_may_quote_a_tenant_is_left_out_of_a_traceback() -> None:
    exception = json.loads(_said("json", "api")[2])["exception"]
    assert "ValueError: <message dropped>" in exception
    assert "line 11" in exception
    code = (
        "from medley import logs; logs.configure('worker')\n"
        "from sqlalchemy.exc import IntegrityError\n"
        "try: raise KeyError('kept')\n"
        "except KeyError: raise IntegrityError('SELECT', {}, ValueError('Failing row contains (a secret)'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "secret" not in done.stdout + done.stderr
    assert "CRITICAL process.crashed" in done.stdout
    assert "IntegrityError: <message dropped>" in done.stdout
    assert "KeyError: 'kept'" in done.stdout
