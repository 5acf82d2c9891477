"""Adapters as requests name them, by a name of this process or by tenant and revision, and their keys in memory.

Knows adapter memory; no rows, no steps. Names are for callers of `Engine` in their own process.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from pathlib import Path

from medley.spec.base_models import BaseModel
from medley.spec.errors import ErrorCode
from medley.spec.intake import check_folder
from medley.spec.wire import AdapterRef
from medley_worker.engine.residency import CachedResidency
from medley_worker.engine.sequences import AdapterKey, Refused

OFFLINE = "offline"  # stands where the tenant stands in the key of an adapter that has a name only
InUse = Callable[[], Set[AdapterKey | None]]


class AdapterNames:
    """in_use, where it is asked for: the adapters of requests in flight."""

    def __init__(self, residency: CachedResidency, model: BaseModel) -> None:
        self._residency, self._model = residency, model

    def add(self, name: str, adapter_dir: Path) -> None:
        """See `Engine.add_adapter`."""
        key = (OFFLINE, name)
        if self._residency.is_known(key):
            raise ValueError(f"adapter {name!r} is known already; remove_adapter({name!r}) first")
        check_folder(adapter_dir, self._model)
        self._residency.add(key, adapter_dir)

    def remove(self, name: str, in_use: InUse) -> None:
        """See `Engine.remove_adapter`."""
        key = (OFFLINE, name)
        if key in in_use():
            raise ValueError(f"adapter {name!r} is in use by requests in flight")
        if not self._residency.is_known(key):
            raise KeyError(name)
        self._residency.remove(key)

    def key_of(self, adapter: str | AdapterRef | None, in_use: InUse) -> AdapterKey | None:
        """The key of a request's adapter, which is known from now on. Raises Refused for a name that nobody gave, and
        for a reference whose files are no adapter.
        """
        if adapter is None:
            return None
        if isinstance(adapter, AdapterRef):
            return self._key_of_ref(adapter, in_use)
        key = (OFFLINE, adapter)
        if not self._residency.is_known(key):
            raise Refused(
                ErrorCode.ADAPTER_UNAVAILABLE, f"adapter: got {adapter!r}, wanted a name given to add_adapter"
            )
        return key

    def _key_of_ref(self, ref: AdapterRef, in_use: InUse) -> AdapterKey:
        key = (ref.tenant, ref.revision)
        if not self._residency.is_known(key):
            if self._residency.is_crowded:
                used = in_use()
                self._residency.prune(lambda known: known[0] == OFFLINE or known in used)
            self._residency.add(key, Path(ref.path))
        return key
