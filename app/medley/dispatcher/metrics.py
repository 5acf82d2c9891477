"""Metrics for Prometheus: what the leader saw in its last plan, and what workers have counted.

Gathered when somebody asks, on the asker's thread; the loop only leaves its last view there. Labels name the pool,
workers' states and kinds of calls: no tenant, no adapter, nothing that a job says. A standby says that it is one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from uuid import UUID
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from medley.config_scale import ScaleSettings
from medley.db.workers import WorkerState
from medley.dispatcher.glance import Glance
from medley.environment import ConfigError

# Of workers' totals: the metric, what their reports call it, and what it is.
TOTALS = (
    ("medley_steps", "steps", "Forward passes."),
    ("medley_step_seconds", "step_s", "Seconds inside steps."),
    ("medley_step_rows", "rows", "Rows of all steps; over medley_steps_total, rows a step."),
    ("medley_step_adapters", "adapters", "Distinct adapters of all steps; over medley_steps_total, adapters a step."),
    ("medley_prompt_tokens", "prompt_tokens", "Prompt tokens computed, recompute included."),
    ("medley_generated_tokens", "generated_tokens", "Tokens generated."),
    ("medley_preemptions", "preemptions", "Rows that were sent back to the line for want of KV pages."),
    ("medley_adapter_loads", "adapter_loads", "Adapters loaded to device memory."),
    ("medley_adapter_evictions", "adapter_evictions", "Adapters that left device memory for others."),
)


class FleetCollector(Collector):
    """look: the leader's last view, None while another leads. counts: the loop's own, by name."""

    def __init__(
        self,
        pool: str,
        look: Callable[[], Glance | None],
        counts: Callable[[], Mapping[str, float]],
        calls: Callable[[], Mapping[tuple[str, str], int]] = dict,
    ) -> None:
        self._pool = pool
        self._look = look
        self._counts = counts
        self._calls = calls
        self._lock = threading.Lock()  # two may ask at once
        self._seen: dict[UUID, Mapping[str, Any]] | None = None
        self._sums = dict.fromkeys((field for _, field, _ in TOTALS), 0.0)

    def describe(self) -> Iterator[Metric]:
        """Nothing: asked at registration, when there is nothing to see yet."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        glance = self._look()
        yield self._gauge("medley_leader", "1 where this dispatcher leads its pool.", 0 if glance is None else 1)
        for name, value in self._counts().items():
            yield self._counter(name, "Of this dispatcher: " + name.removeprefix("medley_").replace("_", " "), value)
        calls = CounterMetricFamily(
            "medley_scale_calls", "Calls of the scale hook.", labels=("pool", "type", "outcome")
        )
        for (kind, outcome), num in self._calls().items():
            calls.add_metric((self._pool, kind, outcome), num)
        yield calls
        with self._lock:
            if glance is not None:
                self._add_up(glance)
            for name, field, text in TOTALS:
                yield self._counter(name, text, self._sums[field])
        if glance is not None:
            yield from self._levels(glance)

    def _levels(self, glance: Glance) -> Iterator[Metric]:
        active = glance.active()
        used = sum(row.stats.get("num_running") or 0 for row in active)
        rows = sum(row.max_num_seqs for row in active)
        for name, text, value in (
            ("medley_queued_jobs", "Jobs that wait for a worker; paused ones are left out.", glance.num_queued),
            ("medley_queued_tokens", "What they will be charged as, in tokens, by estimate.", glance.queued_tokens),
            ("medley_queued_lanes", "Adapters (and tenants' bases) for which jobs wait.", len(glance.waiting)),
            (
                "medley_unserved_seconds",
                "The longest that an adapter's waiting jobs have gone without one being taken.",
                glance.unserved_s,
            ),
            (
                "medley_oldest_batch_seconds",
                "Age of the oldest batch that has not finished and is not paused.",
                glance.oldest_batch_s,
            ),
            ("medley_leased_jobs", "Jobs that workers hold.", glance.num_leased),
            ("medley_workers_wanted", "Workers that would begin all that waits in time.", glance.num_wanted),
            ("medley_workers_registered", "Workers that live and may serve.", glance.num_registered),
            ("medley_rows", "Rows of the active workers.", rows),
            ("medley_rows_used", "Rows in which jobs run.", used),
        ):
            yield self._gauge(name, text, value)
        states = GaugeMetricFamily("medley_workers", "Living workers by state.", labels=("pool", "state"))
        counts = glance.states
        for state in WorkerState:
            if state is not WorkerState.GONE:
                states.add_metric((self._pool, state.value), counts[state.value])
        yield states
        held = GaugeMetricFamily("medley_workers_held", "Workers that an operator holds.", labels=("pool", "state"))
        for state in (WorkerState.ACTIVE, WorkerState.ASLEEP):
            held.add_metric((self._pool, state.value), sum(row.held_state == state for row in glance.rows))
        yield held

    def _add_up(self, glance: Glance) -> None:
        """Counters go on when workers come and go; what was counted before the first look is nobody's rate."""
        now: dict[UUID, Mapping[str, Any]] = {row.id: row.stats for row in glance.rows}
        if self._seen is not None:
            for worker, stats in now.items():
                before = self._seen.get(worker, {})
                for field in self._sums:
                    self._sums[field] += max(0.0, (stats.get(field) or 0) - (before.get(field) or 0))
        self._seen = now

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=("pool",))
        family.add_metric((self._pool,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=("pool",))
        family.add_metric((self._pool,), value)
        return family


class MetricsServer:
    """GET /metrics on `host`:`port`, in threads of its own."""

    def __init__(self, collector: Collector, settings: ScaleSettings) -> None:
        """Raises ConfigError where the address is taken or is none of this machine's."""
        assert settings.metrics_port is not None
        registry = CollectorRegistry()
        registry.register(collector)
        try:
            server, self._thread = start_http_server(settings.metrics_port, settings.metrics_host, registry)
        except OSError as error:
            address = f"{settings.metrics_host}:{settings.metrics_port}"
            wanted = f"an address of this machine that is free ({error.strerror})"
            raise ConfigError("MEDLEY_METRICS_PORT", address, wanted) from error
        self._server: WSGIServer = server
        self.port = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
