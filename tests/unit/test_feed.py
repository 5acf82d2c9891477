"""The feed: an engine that rests gets no jobs and still forgets, and forgets what was announced to it as well."""

from __future__ import annotations

from pathlib import Path
from typing import cast
from uuid import UUID

from medley.spec.sampling import SamplingParams
from medley.spec.wire import AdapterRef, Forget, JobKey, ToEngine, Upcoming, WorkItem
from medley_worker.shell.engine_link import EngineLink
from medley_worker.shell.feed import Feed
from medley_worker.shell.held import Held, HeldJobs

TENANT = UUID(int=1)


class Link:
    """What an engine's link was given to send; tests/service runs the feed over real ones."""

    def __init__(self) -> None:
        self.sent: list[ToEngine] = []
        self.jobs: list[WorkItem] = []

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    def add(self, items: list[WorkItem]) -> None:
        self.jobs += items


def adapter(number: int) -> AdapterRef:
    return AdapterRef(TENANT, UUID(int=number), str(Path("/adapters") / str(number)))


def job(number: int, of: AdapterRef) -> Held:
    key = JobKey(UUID(int=number), 1)
    return Held(key, WorkItem(key, (1, 2), of, SamplingParams(max_tokens=1)))


def forgotten(link: Link) -> list[AdapterRef]:
    return [ref for message in link.sent if isinstance(message, Forget) for ref in message.adapters]


def opened(feed: Feed) -> Link:
    link = Link()
    feed.open(cast(EngineLink, link))
    return link


def test_an_engine_that_rests_gets_no_jobs_and_forgets_what_it_was_given() -> None:
    held = HeldJobs()
    feed = Feed(held)
    link = opened(feed)
    held.hold([job(1, adapter(5))])
    feed.offer()
    assert len(link.jobs) == 1
    held.end(JobKey(UUID(int=1), 1))
    held.drop([JobKey(UUID(int=1), 1)])
    feed.rest()
    feed.rest()
    held.hold([job(2, adapter(6))])
    feed.offer()
    assert len(link.jobs) == 1
    assert feed.forget([adapter(5).revision, adapter(6).revision]) == 1
    assert forgotten(link) == [adapter(5)]
    feed.open(cast(EngineLink, link))
    assert [item.key.job.int for item in link.jobs] == [1, 2]


def test_what_was_announced_and_never_came_is_forgotten_too_and_not_announced_again() -> None:
    feed = Feed(HeldJobs())
    link = opened(feed)
    feed.expect((adapter(5), adapter(6)))
    feed.rest()
    assert set(feed.given()) == {adapter(5).revision, adapter(6).revision}
    assert feed.forget([adapter(5).revision]) == 1
    assert forgotten(link) == [adapter(5)]
    link.sent.clear()
    feed.open(cast(EngineLink, link))
    assert link.sent == [Upcoming((adapter(6),))]
    assert feed.given() == [adapter(6).revision]


def test_what_is_announced_to_an_engine_that_rests_comes_to_it_when_it_is_open_again() -> None:
    feed = Feed(HeldJobs())
    link = opened(feed)
    feed.rest()
    feed.expect((adapter(5),))
    assert link.sent == []
    assert feed.given() == []
    feed.open(cast(EngineLink, link))
    assert link.sent == [Upcoming((adapter(5),))]
    assert feed.given() == [adapter(5).revision]


def test_a_new_engine_was_given_nothing() -> None:
    feed = Feed(HeldJobs())
    opened(feed)
    feed.expect((adapter(5),))
    feed.expect(())
    feed.close()
    opened(feed)
    assert feed.given() == []
