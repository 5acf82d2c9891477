"""Two dispatchers: one leads, the other follows within two terms, and what the first says late is refused."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

import pytest
from fleets import Fleet, Member
from stacks import NOISE_S, TICK_S, Service, finish, sweep_jobs

from medley.client import Batch
from medley.dispatcher.lead import TERM_TICKS

pytestmark = pytest.mark.faults

SEED = 20261125
TERM_S = TERM_TICKS * TICK_S


def _term(service: Service) -> int:
    return service.scalar("SELECT coalesce(max(term), 0) FROM leaders")


@pytest.fixture
def pair(start_fleet: Callable[..., Fleet]) -> tuple[Fleet, Member, Member]:
    """Two workers, and two dispatchers beside the stack's own, which is ended for good: the first of them leads."""
    fleet = start_fleet()
    service = fleet.service
    first = fleet.add("dispatcher", "dispatcher1")
    service.stack.kill("dispatcher", number=signal.SIGSTOP)
    service.wait_until("the first leads", lambda: "term.began" in first.log(), 60)
    second = fleet.add("dispatcher", "dispatcher2")
    for number in range(2):
        fleet.add("worker", f"worker{number}", MEDLEY_MAX_NUM_SEQS="8", MEDLEY_START="active", MEDLEY_LEASE_S="30")
    return fleet, first, second


def test_a_stopped_leader_is_followed_within_two_terms_and_its_late_writes_are_refused(
    pair: tuple[Fleet, Member, Member],
) -> None:
    fleet, first, second = pair
    service, draw = fleet.service, random.Random(SEED)
    batch = service.client.submit_many(sweep_jobs(SEED, 500))
    others: list[Batch] = []
    took_s: list[float] = []
    for turn in range(3):
        share = draw.uniform(0.05, 0.25)
        service.wait_progress(batch, min(0.9, batch.refresh().counts.ended / 500 + share))
        term = _term(service)
        began = {member.name: member.log().count("term.began") for member in (first, second)}
        leader = _leader(service, first, second)
        other = second if leader is first else first
        leader.send(signal.SIGSTOP)
        try:
            took_s += [
                service.wait_until(
                    "the other leads",
                    lambda other=other, began=began: other.log().count("term.began") > began[other.name],
                    60,
                )
            ]
            assert _term(service) > term
            others = [*others, service.client.submit_many(sweep_jobs(SEED + 2 + turn, 20))]
            service.wait_progress(others[-1], 1.0)
        finally:
            leader.send(signal.SIGCONT)
    # One that was stopped within a transaction holds its term's row until PostgreSQL ends that.
    assert min(took_s) <= 2 * TERM_S + NOISE_S
    finish(service, batch, *others)
    # Each job was given to one worker at a time: as many attempts as claims, none of which overlapped another.
    assert service.scalar("SELECT count(*) FROM jobs WHERE attempt > 1") == 0


def test_a_killed_leader_is_followed_within_two_terms(pair: tuple[Fleet, Member, Member]) -> None:
    fleet, first, second = pair
    service = fleet.service
    batch = service.client.submit_many(sweep_jobs(SEED + 1, 300))
    service.wait_progress(batch, 0.2)
    leader = _leader(service, first, second)
    other = second if leader is first else first
    leader.is_kept = False
    began = other.log().count("term.began")
    leader.send(signal.SIGKILL)
    took_s = service.wait_until("the other leads", lambda: other.log().count("term.began") > began, 60)
    assert took_s <= 2 * TERM_S + NOISE_S
    finish(service, batch)
    assert service.scalar("SELECT count(*) FROM jobs WHERE attempt > 1") == 0


def _leader(service: Service, first: Member, second: Member) -> Member:
    """Whose id stands in the leader's row."""

    def led_by(member: Member) -> bool:
        holder = "SELECT count(*) FROM leaders WHERE until > clock_timestamp() AND replace(holder::text, '-', '') = :id"
        began = [line for line in member.log().splitlines() if "term.began" in line]
        ids = [line.partition("dispatcher=")[2].split()[0] for line in began]
        return any(service.scalar(holder, id=id_) for id_ in ids)

    service.wait_until("one of the two leads", lambda: led_by(first) or led_by(second), 60)
    return first if led_by(first) else second
