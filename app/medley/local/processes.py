"""The table of processes: the one list from which `medley up` and compose.yaml are both made.

Each row says what a process is called, how it is started, which database role it takes, what it waits for, how
one sees that it is well, and when it is stopped. It starts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Health(Enum):
    """How one sees that a process is well."""

    EXIT = "exit"  # it runs once and ends with status 0
    HTTP = "http"  # GET /readyz says 200
    BEAT = "beat"  # its loop touches MEDLEY_HEALTH_FILE each turn


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """One kind of process. `args` follow `medley` on its command line."""

    name: str
    args: tuple[str, ...]
    role: str  # of the database
    after: tuple[str, ...]  # servers and processes that must be well before it starts
    health: Health
    image: str  # "app" has no torch; "worker" has
    stop_stage: int = 0  # lower stages stop first, each wholly before the next
    stop_grace_s: float = 10.0
    is_replicated: bool = False  # `--workers N`
    serves_port: bool = False
    profiles: tuple[str, ...] = ()  # of compose; none: always started


SERVERS = ("postgres", "redis")

PROCESSES = (
    ProcessSpec(
        name="migrate",
        args=("migrate",),
        role="medley_owner",
        after=("postgres",),
        health=Health.EXIT,
        image="app",
    ),
    ProcessSpec(
        name="api",
        args=("api",),
        role="medley_api",
        after=("migrate", "redis"),
        health=Health.HTTP,
        image="app",
        stop_stage=2,
        serves_port=True,
    ),
    ProcessSpec(
        name="dispatcher",
        args=("dispatcher",),
        role="medley_work",
        after=("migrate", "redis"),
        health=Health.BEAT,
        image="app",
        stop_stage=1,
    ),
    ProcessSpec(
        name="tasks",
        args=("tasks",),
        role="medley_work",
        after=("migrate", "redis"),
        health=Health.BEAT,
        image="app",
        stop_stage=1,
    ),
    ProcessSpec(
        name="worker",
        args=("worker",),
        role="medley_work",
        after=("migrate", "redis"),
        health=Health.BEAT,
        image="worker",
        # First: while it drains, its jobs go back to the queue, which all others serve.
        stop_stage=0,
        stop_grace_s=30.0,
        is_replicated=True,
        profiles=("gpu", "cpu"),
    ),
)


def process(name: str) -> ProcessSpec:
    """The row of that name; `KeyError` where there is none."""
    for spec in PROCESSES:
        if spec.name == name:
            return spec
    raise KeyError(name)
