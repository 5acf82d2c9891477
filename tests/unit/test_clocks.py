"""Only the database's clock decides: where the clock of a host is read at all, it is listed here with what for."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted([*(ROOT / "app").rglob("*.py"), *(ROOT / "workers").rglob("*.py")])
CLOCKS = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}

# Nothing of this decides who leads, who holds a job, or when something is due in PostgreSQL.
HARMLESS = {
    "app/medley/spec/ids.py": "ids are roughly in the order of their making; nobody reads a time from them to decide",
    "app/medley/spec/webhooks.py": "the receiver's own check of a message's age",
    "app/medley/tasks/deliver.py": "the time that a webhook's message says it was sent",
    "app/medley/api/usage.py": "the last day of a report that names none",
    "app/medley/api/rates.py": "how long a client over its rate is asked to wait, beside Redis's window",
    "app/medley/api/webhooks.py": "the time that a test message says it was sent",
    "app/medley/api/openai/chat_template.py": "a template that asks for today's date",
    "app/medley/objects.py": "left-overs of broken uploads, by the same host's files",
    "app/medley/objects_s3.py": "left-overs of broken uploads, hours old",
    "app/medley/cli/keys.py": "an expiry that an operator gives in days",
    "app/medley/local/backup.py": "a note in a backup",
    "app/medley/local/datadir.py": "a note in a lock file",
    "app/medley/dispatcher/hooks.py": "the time that a call of the scale hook says it was sent",
    "app/medley/dispatcher/scale_calls.py": "the time that a call of the scale hook says it was made",
    "app/medley/health.py": "the age of a file of the same host",
    "workers/medley_worker/shell/folder_cache.py": "left-overs of broken downloads, by the same host's files",
}


def reads_of_clocks(source: str) -> list[int]:
    """The lines on which a host's clock is read."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and any(ast.unparse(node).endswith(clock) for clock in CLOCKS)
    ]


def test_a_hosts_clock_is_read_only_where_it_decides_nothing() -> None:
    found = {str(path.relative_to(ROOT)) for path in FILES if reads_of_clocks(path.read_text())}
    assert found == set(HARMLESS)


def test_the_search_finds_clocks_and_leaves_the_monotonic_one_alone() -> None:
    source = "x = time.time()\ny = time.monotonic()\nz = datetime.datetime.now(UTC)"
    assert reads_of_clocks(source) == [1, 3]
