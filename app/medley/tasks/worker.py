"""The process of the CPU tasks: a Celery worker in the foreground, and a look each second that needs no messages.

Owns threads, signals and the exit status; what a task does stands in its own module.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from uuid import UUID

import celery.worker.state
import structlog
from celery import Celery
from sqlalchemy import Engine
from sqlalchemy.exc import InternalError, OperationalError

from medley.api.openai.requests import RequestReader
from medley.api.openai.tokens import TokenTexts
from medley.celery_app import TASKS_QUEUE, make_celery, make_worker
from medley.config import Settings
from medley.db.connections import make_engine
from medley.db.erasure import NotErasable
from medley.health import beat
from medley.objects import StoreError
from medley.rings import CANCEL_TASK, DELIVER_TASK, EXPAND_TASK, MAINTAIN_TASK, OPENAI_TASK, Ringer
from medley.store import Store
from medley.tasks import deliver
from medley.tasks.cancel import Canceller
from medley.tasks.deliver import Deliverer
from medley.tasks.expand import Expander
from medley.tasks.finalize import Finalizer
from medley.tasks.maintain import maintain
from medley.tasks.openai_batches import OpenAIBatches
from medley.tasks.orphans import Orphans
from medley.tasks.validate import Validator

NUM_THREADS = 2  # a long expansion beside short ones
# Each on a thread of its own: a look runs what it finds, and a long one keeps no other waiting.
LOOKS = ("sweeps", "openai", "webhooks", "cancels")
LOOK_S = 1.0

log = structlog.get_logger()


def run(settings: Settings) -> None:
    """Runs tasks until SIGTERM or SIGINT; each stops after its present chunk. Exits with status 1 on a crash."""
    store = Store.open(settings.store_url)
    num_connections = NUM_THREADS + len(LOOKS) + deliver.NUM_THREADS
    engine = make_engine(settings.database_url, name="tasks", pool_size=num_connections)
    ringer = Ringer(settings.redis_url)
    expander = Expander(
        engine,
        ringer,
        settings.pool,
        on_chunk=lambda: beat(settings.health_file),
        should_stop=_is_stopping,
    )
    canceller = Canceller(
        engine,
        ringer,
        settings.pool,
        on_chunk=lambda: beat(settings.health_file),
        should_stop=_is_stopping,
    )
    deliverer = Deliverer(engine, allow_loopback=settings.webhook_loopback, should_stop=_is_stopping)
    openai_batches = _openai_batches(settings, engine, store, ringer)
    looks = (expander.look, openai_batches.look, deliverer.look, canceller.look)
    threading.excepthook = _end_on_crash
    for name, look in zip(LOOKS, looks, strict=True):
        threading.Thread(target=_look, args=(look, settings), name=f"look-{name}", daemon=True).start()
    app = make_celery(settings.redis_url, consumes=True)
    _add_tasks(app, expander, openai_batches, deliverer, canceller)
    _add_maintenance(app, engine, store)
    worker = make_worker(app, TASKS_QUEUE, pool="threads", concurrency=NUM_THREADS)
    worker.start()
    deliverer.close()
    ringer.close()
    engine.dispose()
    if worker.exitcode:
        raise SystemExit(worker.exitcode)


def _openai_batches(settings: Settings, engine: Engine, store: Store, ringer: Ringer) -> OpenAIBatches:
    def on_chunk() -> None:
        beat(settings.health_file)

    validator = Validator(
        engine,
        store.objects,
        ringer,
        RequestReader.open(settings),
        settings,
        on_chunk=on_chunk,
        should_stop=_is_stopping,
    )
    finalizer = Finalizer(
        engine,
        store.objects,
        ringer,
        TokenTexts.open(settings),
        settings.base_name,
        on_chunk=on_chunk,
        should_stop=_is_stopping,
    )
    return OpenAIBatches(engine, settings.pool, validator, finalizer, should_stop=_is_stopping)


def _add_tasks(
    app: Celery,
    expander: Expander,
    openai_batches: OpenAIBatches,
    deliverer: Deliverer,
    canceller: Canceller,
) -> None:
    @app.task(name=EXPAND_TASK, shared=False)  # type: ignore[untyped-decorator]
    def expand(sweep: str) -> None:
        expander.expand(UUID(hex=sweep))

    @app.task(name=OPENAI_TASK, shared=False)  # type: ignore[untyped-decorator]
    def run_openai_batch(batch: str) -> None:
        openai_batches.run(UUID(hex=batch))

    @app.task(name=DELIVER_TASK, shared=False)  # type: ignore[untyped-decorator]
    def send_event(delivery: str) -> None:
        deliverer.begin(UUID(hex=delivery))

    @app.task(name=CANCEL_TASK, shared=False)  # type: ignore[untyped-decorator]
    def end_cancelled(batch: str) -> None:
        canceller.run(UUID(hex=batch))


def _add_maintenance(app: Celery, engine: Engine, store: Store) -> None:
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


def _look(look: Callable[[], None], settings: Settings) -> None:
    while not _is_stopping():
        beat(settings.health_file)
        try:
            look()
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
