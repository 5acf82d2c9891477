"""Adapter memory as the scheduler sees it: the adapter cache, with its errors turned into jobs' errors.

Announces a sequence before its adapter is read, since a broken file may end the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from medley.spec.errors import ErrorCode
from medley_worker.engine.adapters import AdapterCache, AdapterTooLarge, AdapterUnavailable
from medley_worker.engine.sequences import AdapterKey, Refused, Sequence

MIN_KNOWN = 2048  # adapters known at once before a look at who still wants them; a header takes some 50 KB


@dataclass(frozen=True, slots=True)
class ResidencyStats:
    loads: int
    evictions: int
    load_s: float
    tiles_used: int
    num_tiles: int
    revisions: tuple[UUID, ...]


class CachedResidency:
    """`scheduler.Residency` over an AdapterCache. announce: called with sequences before a load for them."""

    def __init__(self, cache: AdapterCache, announce: Callable[[Seq[Sequence]], None]) -> None:
        self._cache = cache
        self._announce = announce
        self._prune_at = MIN_KNOWN

    def add(self, key: AdapterKey, path: Path) -> None:
        """Make an adapter known; its header is read now, its weights when first used. Raises Refused."""
        with _refusals():
            self._cache.register(key, path)

    @property
    def is_crowded(self) -> bool:
        """Whether so many are known that it is time to `prune`."""
        return self.num_known >= self._prune_at

    @property
    def num_known(self) -> int:
        return self._cache.num_registered

    def prune(self, is_wanted: Callable[[AdapterKey], bool]) -> None:
        """Forget the headers of adapters that are neither in memory nor wanted, so that they do not pile up."""
        self._cache.prune(is_wanted)
        self._prune_at = max(MIN_KNOWN, 2 * self.num_known)

    def is_known(self, key: AdapterKey) -> bool:
        return self._cache.is_registered(key)

    def remove(self, key: AdapterKey) -> None:
        self._cache.forget(key)

    def evict_all(self) -> None:
        """Leave the device's memory, which is about to go. No request is in flight."""
        self._cache.evict_all()

    def is_resident(self, key: AdapterKey) -> bool:
        return self._cache.is_resident(key)

    @property
    def loads_ahead(self) -> bool:
        return self._cache.loads_ahead

    def is_ready(self, key: AdapterKey) -> bool:
        return self._cache.is_ready(key)

    def wait(self, timeout_s: float) -> None:
        """Wait until one more adapter can be loaded without waiting for a disk, at most `timeout_s`."""
        self._cache.wait(timeout_s)

    def can_admit(self, key: AdapterKey) -> bool:
        return self._cache.can_admit(key)

    def load(self, key: AdapterKey, sequence: Sequence) -> None:
        if not sequence.is_announced:
            self._announce([sequence])
        with _refusals():
            self._cache.load(key)

    def pin(self, key: AdapterKey) -> None:
        self._cache.pin(key)

    def unpin(self, key: AdapterKey) -> None:
        self._cache.unpin(key)

    def set_paths(self, paths: Mapping[AdapterKey, Path]) -> None:
        self._cache.set_paths(paths)

    def set_upcoming(self, keys: Seq[AdapterKey]) -> None:
        self._cache.set_upcoming(keys)

    def stats(self) -> ResidencyStats:
        cache = self._cache
        return ResidencyStats(
            loads=cache.loads,
            evictions=cache.evictions,
            load_s=cache.load_s,
            tiles_used=cache.tiles_used,
            num_tiles=cache.num_tiles,
            revisions=tuple(key[1] for key in cache.resident() if isinstance(key[1], UUID)),
        )

    def close(self) -> None:
        self._cache.close()

    def check_integrity(self) -> None:
        self._cache.check_integrity()


@contextmanager
def _refusals() -> Iterator[None]:
    """The cache's errors as those of a job."""
    try:
        yield
    except AdapterTooLarge as error:
        raise Refused(ErrorCode.ADAPTER_TOO_LARGE, str(error)) from error
    except AdapterUnavailable as error:
        raise Refused(ErrorCode.ADAPTER_UNAVAILABLE, str(error)) from error
