"""Rings over a real Redis: heard when it is there, harmless when it is not."""

from __future__ import annotations

import json
import threading
import time
from base64 import b64decode

import pytest
import redis

from medley.celery_app import make_celery, task_message
from medley.local.embedded import EmbeddedServers
from medley.rings import Bell, Ringer, pool_channel


@pytest.fixture
def bell(redis_url: str):
    bell = Bell(redis_url, pool_channel("p"))
    assert bell.wait_for_ring(1), "a new subscription counts as a ring"
    yield bell
    bell.close()


def test_a_ring_wakes_the_bell_and_many_rings_wake_it_once(redis_url: str, bell: Bell) -> None:
    ringer = Ringer(redis_url)
    try:
        for _ in range(100):
            ringer.ring(pool_channel("p"))
        started = time.monotonic()
        assert bell.wait_for_ring(5)
        assert time.monotonic() - started < 1
        ringer.close()
        bell.wait_for_ring(0.3)
        assert not bell.wait_for_ring(0.1)
    finally:
        ringer.close()


def test_a_bell_that_is_not_rung_sleeps_its_time(bell: Bell) -> None:
    started = time.monotonic()
    assert not bell.wait_for_ring(0.3)
    assert 0.25 < time.monotonic() - started < 2


def test_a_task_message_reaches_the_celery_queue_once(redis_url: str) -> None:
    ringer = Ringer(redis_url)
    ringer.send_task("medley.expand", "00" * 16)
    ringer.close()
    with redis.Redis.from_url(redis_url) as client:
        assert client.llen("tasks") == 1


def _shape(value: object) -> object:
    """What kinds of values stand where, beside ids that differ from message to message."""
    if isinstance(value, dict):
        return {key: _shape(inner) for key, inner in value.items()}
    return [_shape(inner) for inner in value] if isinstance(value, list) else type(value)


def test_a_task_message_is_what_celery_itself_would_have_sent(redis_url: str) -> None:
    queue, args = "gpu.somewhere", ("one", ("a", "b"))
    make_celery(redis_url).send_task("medley.run_jobs", args=list(args), queue=queue)
    with redis.Redis.from_url(redis_url) as client:
        theirs = json.loads(client.lpop(queue))
    ours = json.loads(task_message("medley.run_jobs", args, queue))
    assert _shape(ours) == _shape(theirs)
    assert ours["headers"]["task"] == theirs["headers"]["task"]
    assert ours["headers"]["id"] == ours["properties"]["correlation_id"]
    assert ours["properties"]["delivery_info"] == theirs["properties"]["delivery_info"]
    assert json.loads(b64decode(ours["body"])) == json.loads(b64decode(theirs["body"]))


def test_ringing_a_dead_redis_neither_blocks_nor_raises_and_works_again_after_it(embedded: EmbeddedServers) -> None:
    ringer = Ringer(embedded.redis_url)
    bell = Bell(embedded.redis_url, pool_channel("p"))
    assert bell.wait_for_ring(1)
    embedded.stop("redis")
    try:
        started = time.monotonic()
        for n in range(1000):
            ringer.ring(pool_channel("p"), str(n))
        assert time.monotonic() - started < 0.5
        assert not bell.wait_for_ring(0.2)
    finally:
        embedded.start_redis()
    deadline = time.monotonic() + 10
    while not bell.wait_for_ring(0.2):
        assert time.monotonic() < deadline
    heard = threading.Event()
    thread = threading.Thread(target=lambda: bell.wait_for_ring(5) and heard.set())
    thread.start()
    while not heard.is_set() and time.monotonic() < deadline:
        ringer.ring(pool_channel("p"))
        heard.wait(0.1)
    thread.join()
    assert heard.is_set()
    ringer.close()
    bell.close()
