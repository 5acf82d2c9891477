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
    """One kind of process; `medley <name>` starts it. What is not said is as for most."""

    name: str
    role: str = "medley_work"  # of the database
    after: tuple[str, ...] = ("migrate", "redis")  # servers and processes that must be well before it starts
    health: Health = Health.BEAT
    image: str = "app"  # has no torch; "worker" has
    stop_stage: int = 0  # lower stages stop first, each wholly before the next
    stop_grace_s: float = 10.0
    is_replicated: bool = False  # `--workers N`
    serves_port: bool = False
    profiles: tuple[str, ...] = ()  # of compose; none: always started


SERVERS = ("postgres", "redis")

PROCESSES = (
    ProcessSpec(name="migrate", role="medley_owner", after=("postgres",), health=Health.EXIT),
    ProcessSpec(name="api", role="medley_api", health=Health.HTTP, stop_stage=2, serves_port=True),
    ProcessSpec(name="dispatcher", stop_stage=1),
    ProcessSpec(name="tasks", stop_stage=1),
    ProcessSpec(
        name="worker",
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
