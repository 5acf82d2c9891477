"""The process of the CPU tasks: a Celery worker in the foreground, and a look each second that needs no messages.

Owns threads, signals and the exit status; what a task does stands in its own module.
"""

from __future__ import annotations

import os
import threading
import time
from uuid import UUID

import celery.worker.state
import structlog
from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.exc import InternalError, OperationalError

from medley.celery_app import TASKS_QUEUE, make_celery, make_worker
from medley.config import Settings
from medley.db.connections import make_engine
from medley.db.erasure import NotErasable
from medley.health import beat
from medley.objects import StoreError
from medley.rings import DELIVER_TASK, EXPAND_TASK, MAINTAIN_TASK, Ringer
from medley.store import Store
from medley.tasks import deliver
from medley.tasks.deliver import Deliverer
from medley.tasks.expand import Expander
from medley.tasks.maintain import maintain
from medley.tasks.orphans import Orphans

NUM_THREADS = 2  # a long expansion beside short ones
LOOK_S = 1.0

log = structlog.get_logger()


def run(settings: Settings) -> None:
    """Runs tasks until SIGTERM or SIGINT; a sweep stops after its present chunk. Exits with status 1 on a crash."""
    store = Store.open(settings.store_url)
    engine = make_engine(settings.database_url, name="tasks", pool_size=NUM_THREADS + deliver.NUM_THREADS + 1)
    ringer = Ringer(settings.redis_url)
    expander = Expander(
        engine,
        ringer,
        settings.pool,
        on_chunk=lambda: beat(settings.health_file),
        should_stop=_is_stopping,
    )
    deliverer = Deliverer(engine, allow_loopback=settings.webhook_loopback, should_stop=_is_stopping)
    threading.excepthook = _end_on_crash
    threading.Thread(target=_look, args=(expander, deliverer, settings), name="look", daemon=True).start()
    app = make_celery(settings.redis_url, consumes=True)
    _add_tasks(app, expander, deliverer, engine, store)
    worker = make_worker(app, TASKS_QUEUE, pool="threads", concurrency=NUM_THREADS)
    worker.start()
    deliverer.close()
    ringer.close()
    engine.dispose()
    if worker.exitcode:
        raise SystemExit(worker.exitcode)


def _add_tasks(app: Celery, expander: Expander, deliverer: Deliverer, engine: Engine, store: Store) -> None:
    @app.task(name=EXPAND_TASK, shared=False)  # type: ignore[untyped-decorator]
    def expand(sweep: str) -> None:
        expander.expand(UUID(hex=sweep))

    @app.task(name=DELIVER_TASK, shared=False)  # type: ignore[untyped-decorator]
    def send_event(delivery: str) -> None:
        deliverer.begin(UUID(hex=delivery))

    orphans = Orphans(engine, store)
    is_maintaining = threading.Lock()

    @app.task(name=MAINTAIN_TASK, shared=False)  # type: ignore[untyped-decorator]
    def forget_the_old() -> None:
        if not is_maintaining.acquire(blocking=False):
            return  # a long one is not to take the threads of expansions too
        try:
            maintain(engine, store)
            orphans.look_if_due()
        except (OperationalError, InternalError) as error:  # the next message comes within a minute
            log.warning("maintain.failed", error=type(error.orig).__name__)
        except (OSError, StoreError, NotErasable) as error:
            log.warning("maintain.failed", error=str(error))
        finally:
            is_maintaining.release()


def _look(expander: Expander, deliverer: Deliverer, settings: Settings) -> None:
    while not _is_stopping():
        beat(settings.health_file)
        try:
            deliverer.look()
            expander.look()
        except (OperationalError, InternalError) as error:
            log.warning("look.failed", error=type(error.orig).__name__)
        time.sleep(LOOK_S)


def _is_stopping() -> bool:
    """Whether a signal has told Celery to stop; its flag is an exit status once it is set."""
    state = celery.worker.state
    return any(flag is not None and flag is not False for flag in (state.should_stop, state.should_terminate))


def _end_on_crash(args: threading.ExceptHookArgs) -> None:
    """A thread's fault ends the process: its supervisor starts another."""
    log.error("thread.crashed", thread=args.thread and args.thread.name, exc_info=args.exc_value)
    os._exit(1)
