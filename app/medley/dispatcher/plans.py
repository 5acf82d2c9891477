"""What a plan is made from and what it says: plain data, without rows, clocks or messages.

Times are seconds, sizes tokens or tiles; ids are those of the rows. `policy` makes the plan.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from uuid import UUID

import msgspec


class Phase(Enum):
    ASLEEP = auto()
    WAKING = auto()  # told to be active, not there yet
    ACTIVE = auto()
    DRAINING = auto()  # told to give its jobs back
    LEAVING = auto()  # on its way to sleep or out: neither assigned nor told anything


@dataclass(frozen=True)
class Rules:
    """The policy's constants. Seconds, jobs and shares."""

    backlog_s: float = 1.0  # work that is leased ahead: more than a round trip, less than a tenant's patience
    turns_per_tenant: int = 16  # a plan has about this many turns for each tenant
    max_turn: int = 16  # jobs of one turn
    max_turns: int = 1_000  # a plan has about this many on the whole: where it has room for more jobs, turns are larger
    jobs_a_load: int = 8  # an adapter that is somewhere already is loaded elsewhere for this many jobs or the last
    max_jobs: int = 16_000  # jobs of one plan: about a second of writes
    patience_s: float = 30.0  # a lane that was passed over for longer goes first, one a tenant and plan
    wake_wait_s: float = 0.25  # what the active workers begin within this time wakes nobody
    wake_patience_s: float = 120.0  # a worker that takes longer to wake is no longer waited for
    idle_sleep_s: float = 30.0  # of the last active worker
    drain_after_s: float = 10.0  # over which load is averaged, between two waves of drains, and of other idle workers
    headroom: float = 0.5  # rows that stay free when one is drained: this many times the root of those taken
    drain_share: float = 0.25  # of the active workers that are drained at once (one at the least)
    look_s: float = 1.0  # the longest time between two plans
    min_look_s: float = 0.05
    waking_look_s: float = 0.25  # while jobs wait and no worker is active yet
    num_upcoming: int = 8  # adapters that a worker is told of ahead of their jobs
    scale_wait_s: float = 30.0  # as many workers are wanted as would begin all that waits within this time


class Lane(msgspec.Struct, frozen=True, gc=False):
    """Jobs that wait for one adapter revision of one tenant (None: the base) at one priority."""

    lane: UUID
    tenant: UUID
    revision: UUID | None
    priority: int
    num_queued: int
    est_tokens: float = 1.0  # of one job, as the claim will charge it
    waited_s: float = 0.0  # since the lane was served, or first seen
    num_tiles: int = 0  # of device memory that its adapter takes
    load_tokens: float = 0.0  # what a load of its adapter is charged as


class Tenant(msgspec.Struct, frozen=True, gc=False):
    id: UUID
    service: float  # tokens over weight
    weight: float = 1.0
    is_backlogged: bool = True


class Worker(msgspec.Struct, frozen=True, gc=False):
    id: UUID
    phase: Phase
    max_num_seqs: int
    num_leased: int = 0
    jobs_per_s: float = 0.0  # with all rows taken; 0: not known yet
    idle_s: float = 0.0  # for how long it has held no job
    unchanged_s: float = 0.0  # since its state or desired state changed
    num_tiles: int | None = None  # adapter memory; None: not known, and taken for enough
    tiles_leased: int = 0  # of the adapters of its leased jobs, which cannot leave
    hold: Phase | None = None  # ACTIVE or ASLEEP, where an operator says so: the policy works around it


class Assignment(msgspec.Struct, frozen=True, gc=False):
    """`load_tokens`: charged to the lane's tenant with the jobs, since they bring the adapter to this worker."""

    worker: UUID
    lane: UUID
    num_jobs: int
    load_tokens: float = 0.0
    priority: int = 1


@dataclass(frozen=True)
class Plan:
    """What to write: claims in the order of turns, and the phases that workers are told to take."""

    assignments: list[Assignment]
    desires: dict[UUID, Phase]
    num_left: int  # jobs that wait on
    look_in_s: float  # when to plan again, if nothing rings before
    upcoming: dict[UUID, list[UUID]] = field(default_factory=dict)  # active worker: lanes to come, nearest first
    num_wanted: int = 0  # workers that the pool should have for what it has to do, there or not
