"""Rings over a real Redis: heard when it is there, harmless when it is not."""

from __future__ import annotations

import json
import threading
import time
from base64 import b64decode

import celery.worker.state
import pytest
import redis
from timing import keeps_to, timed
from waiting import wait_until

from medley.celery_app import Call, make_celery, make_worker, send_calls
from medley.local.embedded import EmbeddedServers
from medley.rings import Bell, Ringer, pool_channel


@pytest.fixture
def bell(redis_url: str):
    bell = Bell(redis_url, pool_channel("p"))
    wait_until(lambda: bell.wait_for_ring(1), "a new subscription, which counts as a ring")
    yield bell
    bell.close()


@pytest.mark.usefixtures("patient")
def test_a_ring_wakes_the_bell_and_many_rings_wake_it_once(redis_url: str, bell: Bell) -> None:
    ringer = Ringer(redis_url)
    try:
        for _ in range(100):
            ringer.ring(pool_channel("p"))
        assert bell.wait_for_ring(30)
        ringer.close()
        bell.wait_for_ring(0.3)
        assert not bell.wait_for_ring(0.1)
    finally:
        ringer.close()


def test_a_bell_that_is_not_rung_sleeps_its_time(bell: Bell) -> None:
    started = time.monotonic()
    assert not bell.wait_for_ring(0.3)
    assert 0.25 < time.monotonic() - started < 20


@pytest.mark.usefixtures("patient")
def test_a_task_message_reaches_the_celery_queue_once(redis_url: str) -> None:
    ringer = Ringer(redis_url)
    ringer.send_task("medley.expand", "00" * 16)
    ringer.close()
    with redis.Redis.from_url(redis_url) as client:
        assert client.llen("tasks") == 1


@pytest.mark.usefixtures("patient")
def test_a_worker_of_celerys_own_runs_each_call_once_from_the_queue_that_it_was_sent_to(redis_url: str) -> None:
    """Queues that nobody declared, more calls than go out at once, and all kinds of arguments that we send."""
    ran: list[tuple[object, ...]] = []
    app = make_celery(redis_url, consumes=True)

    @app.task(name="medley.tell", shared=False)
    def tell(*args: object) -> None:
        ran.append(args)

    worker = make_worker(app, "gpu.here", concurrency=1)
    thread = threading.Thread(target=worker.start, daemon=True)
    sent = [(f"{n:032x}", (f"{n:032x}",) * (n % 3)) for n in range(450)]
    ringer = Ringer(redis_url)
    try:
        for args in sent:
            ringer.send_task("medley.tell", *args, queue="gpu.here")
        ringer.send_task("medley.tell", "elsewhere", queue="gpu.there")
        ringer.close()
        thread.start()
        wait_until(lambda: len(ran) >= len(sent))
        assert sorted(ran) == sorted((first, list(rest)) for first, rest in sent)
        with redis.Redis.from_url(redis_url) as client:
            assert client.llen("gpu.here") == 0
            assert client.llen("gpu.there") == 1
    finally:
        ringer.close()
        worker.stop()
        celery.worker.state.should_stop = None


@pytest.mark.usefixtures("patient")
def test_messages_are_json_of_protocol_2_and_name_no_arguments_beside_the_body(redis_url: str) -> None:
    send_calls(make_celery(redis_url), [Call("medley.run_jobs", (("secret",),), "gpu.somewhere")])
    with redis.Redis.from_url(redis_url) as client:
        raw = client.lpop("gpu.somewhere")
    message = json.loads(raw)
    assert message["content-type"] == "application/json"
    assert message["headers"]["task"] == "medley.run_jobs"
    assert json.loads(b64decode(message["body"]))[:2] == [[["secret"]], {}]
    assert b"secret" not in raw


def test_ringing_a_dead_redis_neither_blocks_nor_raises_and_works_again_after_it(embedded: EmbeddedServers) -> None:
    ringer = Ringer(embedded.redis_url)
    bell = Bell(embedded.redis_url, pool_channel("p"))
    wait_until(lambda: bell.wait_for_ring(1))
    embedded.stop("redis")
    try:

        def attempt() -> float:
            with timed() as took:
                for n in range(1000):
                    ringer.ring(pool_channel("p"), str(n))
                    ringer.send_task("medley.lost", str(n), queue="lost")
            return took.seconds

        keeps_to(0.5, attempt)
        assert not bell.wait_for_ring(0.2)
    finally:
        embedded.start_redis()
    deadline = time.monotonic() + 30
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
    ringer.send_task("medley.expand", "00" * 16)
    with redis.Redis.from_url(embedded.redis_url) as client:
        wait_until(lambda: client.llen("tasks") == 1)
    ringer.close()
    bell.close()
