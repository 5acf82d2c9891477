"""The Celery application: how messages travel over Redis. It defines no tasks and knows no jobs.

A message is a hint and may be lost or doubled: whoever gets one looks at rows. Hence JSON alone, no result
backend, no beat, no remote control, no events; and a publisher that gives up within about a second, since what it
would say is found in PostgreSQL within the next.
"""

from __future__ import annotations

import warnings
from base64 import b64encode
from urllib.parse import parse_qsl, urlencode, urlsplit
from uuid import UUID, uuid4

import msgspec
from celery import Celery, signals
from celery.exceptions import SecurityWarning
from celery.worker import WorkController

TASKS_QUEUE = "tasks"

# A publisher waits this long for a dead or frozen Redis, in each of connecting and sending.
PUBLISH_TIMEOUT_S = 0.5
# A consumer's read: above kombu's BRPOP of one second, so that an idle queue is no error.
CONSUME_TIMEOUT_S = 5.0


def worker_queue(worker: UUID) -> str:
    """The queue that one start of a GPU worker reads."""
    return f"gpu.{worker.hex}"


_encode = msgspec.json.Encoder().encode
_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
_HEADERS: dict[str, object] = {
    "lang": "py",
    "shadow": None,
    "eta": None,
    "expires": None,
    "group": None,
    "group_index": None,
    "retries": 0,
    "timelimit": (None, None),
    "parent_id": None,
    "argsrepr": "(...)",
    "kwargsrepr": "{}",
    "origin": "medley",
    "ignore_result": None,
    "replaced_task_nesting": 0,
    "stamped_headers": None,
    "stamps": {},
}


def task_message(name: str, args: tuple[str | tuple[str, ...], ...], queue: str) -> bytes:
    """A call of task `name` as Celery's protocol 2 lies in a Redis list of that name: to be pushed at its left.

    Celery's own `send_task` declares the queue with each message, which costs 0.7 ms of processor time where a
    thousand workers have a queue each; a test holds the two alike.
    """
    id_ = str(uuid4())
    return _encode(
        {
            "body": b64encode(_encode((args, {}, _EMBED))).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {"task": name, "id": id_, "root_id": id_, **_HEADERS},
            "properties": {
                "correlation_id": id_,
                "reply_to": "",
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": id_,
            },
        }
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
