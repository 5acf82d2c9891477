"""Celery over Redis as transport: a publisher never waits long, a consumer comes back, all is JSON."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import pytest
import redis
from kombu.exceptions import EncodeError, OperationalError
from timing import keeps_to, timed
from waiting import wait_until

from medley.celery_app import broker_url, make_celery, worker_queue
from medley.local.child import Child, Command

if TYPE_CHECKING:
    from medley.local.embedded import EmbeddedServers

_QUEUE = "test"
_CONSUMER = """
import sys
from medley.celery_app import make_celery, make_worker

app = make_celery(sys.argv[1], consumes=True)

@app.task(name="test.note")
def note(number):
    with open(sys.argv[3], "a") as file:
        file.write(f"{number}\\n")

make_worker(app, sys.argv[2], pool="solo").start()
"""


class _Consumer:
    """A worker process of the queue that writes down what it gets."""

    def __init__(self, redis_url: str, folder: Path) -> None:
        self._got = folder / "got"
        self._got.touch()
        argv = (sys.executable, "-c", _CONSUMER, redis_url, _QUEUE, str(self._got))
        self.child = Child(Command(name="consumer", argv=argv))

    def received(self) -> list[str]:
        return self._got.read_text().split()


@pytest.fixture
def consumer(redis_url: str, tmp_path: Path) -> Iterator[_Consumer]:
    started = _Consumer(redis_url, tmp_path)
    yield started
    assert started.child.stop(20) == 0


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("unix:///tmp/r.sock", "redis+socket:///tmp/r.sock"),
        ("unix:///tmp/r.sock?db=3", "redis+socket:///tmp/r.sock?virtual_host=3"),
        ("redis://:pw@host:1/2", "redis://:pw@host:1/2"),
        ("rediss://host", "rediss://host"),
    ],
)
def test_redis_urls_are_spelled_as_kombu_wants_them(url: str, expected: str) -> None:
    assert broker_url(url) == expected


def test_a_workers_queue_is_named_by_its_id() -> None:
    assert worker_queue(UUID(int=10)) == "gpu." + "0" * 31 + "a"


def test_a_publisher_waits_no_longer_than_a_second_for_a_frozen_or_dead_redis(
    embedded: EmbeddedServers, redis_url: str
) -> None:
    used, fresh = make_celery(redis_url), make_celery(redis_url)
    _send(used)
    os.kill(embedded.pid("redis"), signal.SIGSTOP)
    try:
        _refused_within_a_second(used)
        _refused_within_a_second(fresh)
    finally:
        os.kill(embedded.pid("redis"), signal.SIGCONT)
    _send(used)
    embedded.kill("redis")
    try:
        _refused_within_a_second(used)
        _refused_within_a_second(make_celery(redis_url))
    finally:
        embedded.start_redis()
    _send(used)
    with redis.Redis.from_url(redis_url) as client:
        assert client.llen(_QUEUE) >= 1


def test_messages_go_on_after_all_of_redis_was_lost(redis_url: str, consumer: _Consumer) -> None:
    publisher = make_celery(redis_url, consumes=True)
    publisher.send_task("test.note", args=[1], queue=_QUEUE)
    wait_until(lambda: consumer.received() == ["1"], "the first message")
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    publisher.send_task("test.note", args=[2], queue=_QUEUE)
    wait_until(lambda: consumer.received() == ["1", "2"], "a message after FLUSHALL")


def test_a_consumer_comes_back_after_redis_was_killed(
    embedded: EmbeddedServers, redis_url: str, consumer: _Consumer
) -> None:
    publisher = make_celery(redis_url, consumes=True)
    publisher.send_task("test.note", args=[1], queue=_QUEUE)
    wait_until(lambda: consumer.received() == ["1"], "the first message")
    embedded.kill("redis")
    embedded.start_redis()
    publisher.send_task("test.note", args=[2], queue=_QUEUE)
    wait_until(lambda: consumer.received() == ["1", "2"], "a message after the restart")


def test_nothing_but_json_travels(redis_url: str) -> None:
    app = make_celery(redis_url)
    assert app.conf.accept_content == app.conf.result_accept_content == ["json"]
    assert app.conf.result_backend is None
    with pytest.raises(EncodeError):
        app.send_task("test.note", args=[object()], queue=_QUEUE)


def _send(app: object) -> None:
    """Until Redis, which may be held up for longer than a publisher waits, has taken a message."""

    def is_sent() -> bool:
        try:
            app.send_task("test.note", args=[1], queue=_QUEUE)  # type: ignore[attr-defined]
        except OperationalError:
            return False
        return True

    wait_until(is_sent, "a message that is taken")


def _refused_within_a_second(app: object) -> None:
    def attempt() -> float:
        with timed() as took, pytest.raises(OperationalError):
            app.send_task("test.note", args=[0], queue=_QUEUE)  # type: ignore[attr-defined]
        return took.seconds

    keeps_to(1, attempt)
