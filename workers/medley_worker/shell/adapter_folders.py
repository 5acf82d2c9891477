"""Where a job's adapter lies on this machine: in the store's own folder, or fetched from a remote one before its use.

Owns the threads that fetch, and which jobs wait for what. A job that waits is not held: the look for missed rows
brings its id again, so nothing is lost where a fetch ends badly. Knows nothing of jobs but their ids.
"""

from __future__ import annotations

import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from os import geteuid
from pathlib import Path
from uuid import UUID

import structlog

from medley.config import WorkerSettings
from medley.objects import StoreError, StoreUnavailable
from medley.store import Store
from medley_worker.shell.folder_cache import FolderCache, NoRoom

NUM_FETCHES = 8  # at once; each is bound by the network
MAX_PATHS = 4_096  # folders of a local store that are remembered
PATIENCE_S = 60.0  # how long a store may be away before jobs that want an adapter of it fail
ARRIVED_S = 30.0  # how long what was fetched is kept for the jobs that asked for it
RELEASE_EVERY_S = 1.0
MAX_FILES = 1 << 16  # open at once: each adapter in use is one

log = structlog.get_logger()


class Coming(Exception):
    """The adapter is on its way: ask again when `on_arrival` has told, or in a second."""


class AdapterFolders:
    """Folders by digest. `path` and `release` are for one thread."""

    def __init__(self, store: Store, cache: FolderCache | None, on_arrival: Callable[[list[UUID]], None]) -> None:
        """cache: where a remote store's adapters go. on_arrival: called with the jobs that waited for a fetch."""
        assert store.is_local or cache is not None, "a remote store wants a cache"
        # A revision never changes its place; the engine says so where its files are gone after all.
        self._local_path = lru_cache(MAX_PATHS)(store.path)
        self._store, self._cache, self._on_arrival = store, cache, on_arrival
        self._lock = threading.Lock()
        self._waiting: dict[str, set[UUID]] = {}  # digest that is being fetched -> jobs that want it
        self._awaiting: set[UUID] = set()  # all of those jobs
        self._failures: dict[str, tuple[Exception, float]] = {}  # and when: told once, to jobs of that moment
        self._failing_since_s: dict[str, float] = {}
        self._arrived_s: dict[str, float] = {}
        self._release_due_s = 0.0
        self._threads: ThreadPoolExecutor | None = None
        if cache is not None:
            self._threads = ThreadPoolExecutor(NUM_FETCHES, thread_name_prefix="fetch")
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            most = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))

    @classmethod
    def open(cls, url: str, settings: WorkerSettings, on_arrival: Callable[[list[UUID]], None]) -> AdapterFolders:
        """Those of the store at `url`. Raises StoreError, ConfigError, OSError for a cache that cannot be used."""
        store = Store.open(url)
        cache = None
        if not store.is_local:
            default = Path(tempfile.gettempdir()) / f"medley-adapters-{geteuid()}"
            cache = FolderCache(settings.store_cache_dir or default, settings.store_cache_bytes)
        return cls(store, cache, on_arrival)

    def path(self, digest: str, job: UUID) -> Path:
        """The folder of a revision, which stays while its jobs are held. Raises Coming, StoreError, OSError."""
        if self._cache is None:
            return self._local_path(digest)
        path = self._cache.use(digest)
        with self._lock:
            if path is not None:
                self._arrived_s.pop(digest, None)
                return path
            failure, failed_s = self._failures.pop(digest, (None, 0.0))
            if failure is not None and time.monotonic() - failed_s < ARRIVED_S:
                raise failure
            is_new = digest not in self._waiting
            self._waiting.setdefault(digest, set()).add(job)
            self._awaiting.add(job)
        if is_new:
            assert self._threads is not None
            self._threads.submit(self._fetch, digest)
        raise Coming(digest)

    def local_path(self, digest: str) -> Path | None:
        """The folder of a revision in a store that is local; None for a remote one. For any thread.

        Raises StoreError, OSError.
        """
        return self._local_path(digest) if self._cache is None else None

    def not_awaiting(self, jobs: Iterable[UUID]) -> list[UUID]:
        """Those of `jobs` that do not wait for a fetch."""
        with self._lock:
            return [job for job in jobs if job not in self._awaiting]

    def release(self, paths: Callable[[], Iterable[str]]) -> None:
        """Each second: only the folders that `paths` gives are in use, and what arrived a moment ago."""
        now_s = time.monotonic()
        if self._cache is None or now_s < self._release_due_s:
            return
        self._release_due_s = now_s + RELEASE_EVERY_S
        in_use = {Path(path).name for path in paths()}
        with self._lock:
            self._arrived_s = {d: at_s for d, at_s in self._arrived_s.items() if now_s - at_s < ARRIVED_S}
            in_use |= set(self._arrived_s)
        self._cache.release(in_use)

    def _fetch(self, digest: str) -> None:
        assert self._cache is not None
        failure: Exception | None = None
        has_ended = True
        try:
            started_s = time.monotonic()
            num_bytes = self._store.size(digest)
            self._cache.add(digest, num_bytes, lambda folder: self._store.fetch(digest, folder))
            elapsed_s = round(time.monotonic() - started_s, 3)
            log.info("adapter.fetched", digest=digest[:16], num_bytes=num_bytes, elapsed_s=elapsed_s)
        except NoRoom as error:
            has_ended = False
            log.warning("adapter.waits", digest=digest[:16], reason=str(error))
        except StoreUnavailable as error:
            has_ended = self._has_lost_patience(digest)
            failure = error if has_ended else None
            log.warning("adapter.unfetched", digest=digest[:16], reason=str(error))
        except (StoreError, OSError) as error:
            failure = error
        except Exception as error:  # lost on this thread, it would leave the adapter's jobs waiting for ever
            log.exception("adapter.unfetched", digest=digest[:16])
            failure = StoreError(f"{type(error).__name__} while it was fetched")
        self._settle(digest, failure, has_ended=has_ended)

    def _has_lost_patience(self, digest: str) -> bool:
        now_s = time.monotonic()
        with self._lock:
            return now_s - self._failing_since_s.setdefault(digest, now_s) > PATIENCE_S

    def _settle(self, digest: str, failure: Exception | None, *, has_ended: bool) -> None:
        with self._lock:
            jobs = self._waiting.pop(digest)
            self._awaiting -= jobs
            if has_ended:
                self._failing_since_s.pop(digest, None)
                if failure is None:
                    self._arrived_s[digest] = time.monotonic()
                else:
                    self._failures[digest] = (failure, time.monotonic())
        if has_ended:  # else the next look for missed rows is soon enough
            self._on_arrival(sorted(jobs))
