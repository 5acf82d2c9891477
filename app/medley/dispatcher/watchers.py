"""Those who watch the leader from threads of their own, as far as they are configured: the scale hook, and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Protocol

import structlog

from medley.config import Settings
from medley.dispatcher.glance import Glance
from medley.dispatcher.hooks import ScaleHook

log = structlog.get_logger()


class Watched(Protocol):
    """What is watched: the dispatcher."""

    def glance(self) -> Glance | None: ...

    def counts(self) -> Mapping[str, float]: ...


@contextmanager
def watchers(settings: Settings, watched: Watched, *, max_age_s: float) -> Iterator[None]:
    """Watches within the block. Raises ConfigError. max_age_s: of a view of the leader that is still believed."""
    scale = settings.scale

    def look() -> Glance | None:
        glance = watched.glance()
        # A process that was frozen leads no more, though it does not know that yet.
        return glance if glance is not None and time.monotonic() - glance.at_s <= max_age_s else None

    with ExitStack() as stack:
        calls: Callable[[], Mapping[tuple[str, str], int]] = dict
        if scale.hook is not None:
            hook = ScaleHook(scale, look)
            stack.callback(hook.close)
            calls = hook.outcomes.copy
        if scale.metrics_port is not None:
            # Imported where metrics are served: nothing else needs the package.
            from medley.dispatcher.metrics import FleetCollector, MetricsServer

            server = MetricsServer(FleetCollector(settings.pool, look, watched.counts, calls), scale)
            stack.callback(server.close)
            log.info("metrics.served", host=scale.metrics_host, port=server.port)
        yield
