"""`up.json`: where a running `medley up` can be reached, for other commands on the same machine.

It holds no secret: the servers' sockets are closed to everyone but their account and root.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec


class StackStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A running stack. `pids` by name: postgres, redis, api, dispatcher, tasks, worker.0, ..."""

    pid: int  # of the supervisor
    url: str
    database_urls: dict[str, str]  # by role
    redis_url: str
    store_url: str
    pids: dict[str, int]
    is_ready: bool


def status_path(data_dir: Path) -> Path:
    return data_dir / "up.json"


def write_status(data_dir: Path, status: StackStatus) -> None:
    """Replace the file in one step, so that a reader never sees half of it."""
    fresh = status_path(data_dir).with_suffix(".new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(status)))
    fresh.replace(status_path(data_dir))


def read_status(data_dir: Path) -> StackStatus | None:
    """The stack that runs on `data_dir`; None where none does (a killed one leaves its file behind)."""
    try:
        status = msgspec.json.decode(status_path(data_dir).read_bytes(), type=StackStatus)
        os.kill(status.pid, 0)
    except (FileNotFoundError, ProcessLookupError, msgspec.DecodeError):
        return None
    except PermissionError:
        pass  # it lives, and is another account's
    return status
