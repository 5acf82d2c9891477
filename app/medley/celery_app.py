"""The Celery application: how messages travel over Redis. It defines no tasks and knows no jobs.

A message is a hint and may be lost or doubled: whoever gets one looks at rows. Hence JSON alone, no result
backend, no beat, no remote control, no events; and a publisher that gives up within about a second, since what it
would say is found in PostgreSQL within the next.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit
from uuid import UUID

from celery import Celery, signals
from celery.exceptions import SecurityWarning
from celery.worker import WorkController
from kombu.utils.uuid import uuid

TASKS_QUEUE = "tasks"

# A publisher waits this long for a dead or frozen Redis, in each of connecting and sending.
PUBLISH_TIMEOUT_S = 0.5
MAX_AT_ONCE = 200  # messages of one round trip
# A consumer's read: above kombu's BRPOP of one second, so that an idle queue is no error.
CONSUME_TIMEOUT_S = 5.0


def worker_queue(worker: UUID) -> str:
    """The queue that one start of a GPU worker reads."""
    return f"gpu.{worker.hex}"


class Call(NamedTuple):
    """A task to be run: its name, its arguments, and the queue that it goes to."""

    name: str
    args: tuple[str | tuple[str, ...], ...]
    queue: str


def send_calls(app: Celery, calls: Iterable[Call], *, at_once: int = MAX_AT_ONCE) -> None:
    """Sends tasks, `at_once` in a round trip. Raises kombu's or redis's error; some may have gone out then.

    Celery makes the messages and kombu puts them in their queues. The queues are not declared, as the default
    exchange leads to each by its name: that took 0.2 ms of 0.25 a message, where a thousand workers have one each.
    """
    with app.producer_pool.acquire(block=True) as producer, producer.batch(max_size=at_once):
        for call in calls:
            # Arguments are ids; their text would only be made to be cut off.
            message = app.amqp.as_task_v2(
                uuid(), call.name, call.args, {}, argsrepr="(...)", kwargsrepr="{}", ignore_result=True
            )
            producer.publish(
                message.body,
                exchange="",
                routing_key=call.queue,
                serializer="json",
                headers=message.headers,
                **message.properties,
            )


def make_celery(redis_url: str, *, consumes: bool = False) -> Celery:
    """An application on `redis_url` (redis://, rediss:// or unix://).

    With `consumes` its timeouts suit a worker's blocking reads; without, a publish raises
    `kombu.exceptions.OperationalError` after about `PUBLISH_TIMEOUT_S` where Redis does not answer.
    """
    timeout_s = CONSUME_TIMEOUT_S if consumes else PUBLISH_TIMEOUT_S
    app = Celery("medley", set_as_current=False)
    app.conf.update(
        broker_url=broker_url(redis_url),
        broker_transport_options={
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            # kombu tries a hundred times by itself; the caller's next ring is soon enough.
            "max_retries": 0,
            "interval_start": 0,
            "interval_step": 0,
            "interval_max": 0,
        },
        broker_connection_timeout=timeout_s,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_pool_limit=4,
        accept_content=["json"],
        result_accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        event_serializer="json",
        result_backend=None,
        task_ignore_result=True,
        task_store_eager_result=False,
        task_acks_late=False,
        task_publish_retry=False,
        task_default_queue=TASKS_QUEUE,
        task_create_missing_queues=True,
        task_send_sent_event=False,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        # Concerns late acknowledgement only, which nothing here uses; unset, each reconnect warns.
        worker_cancel_long_running_tasks_on_connection_loss=True,
        enable_utc=True,
        timezone="UTC",
    )
    return app


def broker_url(redis_url: str) -> str:
    """kombu's spelling of a Redis URL: `unix:///path?db=1` is `redis+socket:///path?virtual_host=1` there."""
    parts = urlsplit(redis_url)
    if parts.scheme != "unix":
        return redis_url
    query = {"virtual_host" if key == "db" else key: value for key, value in parse_qsl(parts.query)}
    user = f"{parts.netloc.rpartition('@')[0]}@" if "@" in parts.netloc else ""
    return f"redis+socket://{user}{parts.path}" + (f"?{urlencode(query)}" if query else "")


def make_worker(app: Celery, queue: str, *, pool: str = "threads", concurrency: int = 1) -> WorkController:
    """A worker of `queue` that says nothing to other workers. `start()` blocks until `stop()` or a signal.

    `app` comes from `make_celery(url, consumes=True)`. It reconnects for ever, with growing pauses of up to
    30 s: whoever relies on its messages looks at rows meanwhile.
    """
    # JSON is all that is accepted, so a message cannot run code, which is what this warning is about.
    warnings.filterwarnings("ignore", message="(?s).*superuser privileges", category=SecurityWarning)
    return app.Worker(
        queues=[queue],
        pool=pool,
        concurrency=concurrency,
        quiet=True,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        task_events=False,
    )


def _leave_logging_alone(**_: object) -> None:
    """A receiver of this signal is how Celery is told that the process has set up its logs."""


signals.setup_logging.connect(_leave_logging_alone)
