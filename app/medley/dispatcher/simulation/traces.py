"""Traces: who asks for what, and when. Columns of numbers, a job a row, in the order of arrival.

Made from a seed alone, by arrival rates (Poisson, as a function of time), popularity of adapters (Zipf), and lengths
(log-normal, cut). It knows no workers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BASE = -1  # a job without an adapter


@dataclass(frozen=True)
class Trace:
    """Jobs in the order of arrival. tenant and adapter are numbers; an adapter belongs to one tenant."""

    name: str
    arrived_s: Floats  # [n], from 0 on
    tenant: Ints  # [n]
    adapter: Ints  # [n], BASE: none
    prompt_tokens: Ints  # [n]
    output_tokens: Ints  # [n], that the job will generate
    max_tokens: Ints  # [n], that it may: what is known beforehand
    priority: Ints  # [n], 0 to 2

    def __len__(self) -> int:
        return len(self.arrived_s)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What jobs are like. Lengths are means of log-normal draws with sigma 0.7, cut at four times the mean."""

    num_tenants: int = 20
    num_adapters: int = 200
    zipf: float = 1.2  # popularity of adapters: the k-th has k ** -zipf
    base_share: float = 0.05
    prompt_tokens: int = 200
    output_tokens: int = 500


SIGMA = 0.7


def _lengths(draw: np.random.Generator, mean: int, num: int) -> Ints:
    values = draw.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, num)
    return np.clip(np.rint(values), 1, 4 * mean).astype(np.int64)


def compose(name: str, arrived_s: Floats, mix: Mix, draw: np.random.Generator, *, first_tenant: int = 0) -> Trace:
    """Jobs of a mix at given times; adapters go to tenants in turns."""
    num = len(arrived_s)
    shares = np.arange(1, mix.num_adapters + 1) ** -mix.zipf
    adapter = draw.choice(mix.num_adapters, num, p=shares / shares.sum()).astype(np.int64)
    tenant = first_tenant + adapter % mix.num_tenants
    adapter = np.where(draw.random(num) < mix.base_share, BASE, adapter + first_tenant * 1_000_000)
    output = _lengths(draw, mix.output_tokens, num)
    # Users ask for a round limit above what they get.
    limit = 2 ** np.ceil(np.log2(output * draw.uniform(1.0, 2.0, num))).astype(np.int64)
    prompt = _lengths(draw, mix.prompt_tokens, num)
    order = np.argsort(arrived_s, kind="stable")
    return Trace(name, arrived_s[order], tenant, adapter, prompt, output, limit, np.ones(num, np.int64))


def poisson(rate: Callable[[Floats], Floats], duration_s: float, draw: np.random.Generator) -> Floats:
    """Arrival times of a Poisson process of `rate` jobs/s over [0, duration_s), by cells of a second."""
    cells = np.arange(int(np.ceil(duration_s)), dtype=np.float64)
    counts = draw.poisson(np.maximum(rate(cells + 0.5), 0.0))
    return np.sort(np.repeat(cells, counts) + draw.random(int(counts.sum())))


def merge(name: str, *traces: Trace) -> Trace:
    """Several traces as one."""
    columns = [
        np.concatenate([getattr(trace, field) for trace in traces])
        for field in ("arrived_s", "tenant", "adapter", "prompt_tokens", "output_tokens", "max_tokens", "priority")
    ]
    order = np.argsort(columns[0], kind="stable")
    return Trace(name, *(column[order] for column in columns))


def ramp(seed: int, duration_s: float, peak: float, mix: Mix) -> Trace:
    """Up from a tenth of `peak` jobs/s and down again, as in Punica's figure of its cluster."""
    draw = np.random.default_rng(seed)
    times = poisson(lambda t: peak * (0.1 + 0.9 * (1.0 - np.abs(2.0 * t / duration_s - 1.0))), duration_s, draw)
    return compose("ramp", times, mix, draw)


def day(seed: int, duration_s: float, peak: float, mix: Mix) -> Trace:
    """A day's shape: a night at a quarter of `peak`, a morning and an afternoon, and noise of minutes."""
    draw = np.random.default_rng(seed)
    knots = np.arange(0.0, 1.0 + 1e-9, 1 / 288)  # five minutes of a day
    noise = np.exp(0.05 * np.convolve(draw.standard_normal(len(knots) + 6), np.ones(7) / np.sqrt(7), "valid"))

    def rate(t: Floats) -> Floats:
        hour = 24.0 * t / duration_s
        morning = np.exp(-(((hour - 11.0) / 2.6) ** 2))
        afternoon = 0.85 * np.exp(-(((hour - 16.5) / 3.0) ** 2))
        shape = 0.25 + 0.75 * np.minimum(1.0, morning + afternoon)
        return np.asarray(peak * shape * np.interp(t / duration_s, knots, noise))

    return compose("day", poisson(rate, duration_s, draw), mix, draw)


def bursts(seed: int, duration_s: float, peak: float, mix: Mix) -> Trace:
    """A low, steady load, and every five minutes a batch of what `peak` brings in 20 to 60 seconds."""
    draw = np.random.default_rng(seed)
    steady = poisson(lambda t: np.full_like(t, 0.2 * peak), duration_s, draw)
    starts = np.arange(60.0, duration_s, 300.0)
    sizes = draw.integers(int(20 * peak), int(60 * peak) + 1, len(starts))
    batches = np.repeat(starts, sizes)
    return merge(
        "bursts",
        compose("steady", steady, mix, draw),
        compose("batches", batches, mix, draw, first_tenant=mix.num_tenants),
    )


def bulk(seed: int, duration_s: float, peak: float, mix: Mix, num_jobs: int = 100_000) -> Trace:
    """One tenant's batch of 100,000 jobs at the start, and others who ask for a twentieth of `peak` jobs/s."""
    draw = np.random.default_rng(seed)
    light = poisson(lambda t: np.full_like(t, 0.05 * peak), duration_s, draw)
    one = replace(mix, num_tenants=1, zipf=0.0, base_share=0.0)
    return merge(
        "bulk",
        compose("light", light, mix, draw),
        compose("heavy", np.zeros(num_jobs), one, draw, first_tenant=mix.num_tenants),
    )


def contention(seed: int, duration_s: float, peak: float, mix: Mix) -> Trace:
    """Everybody has a batch waiting from the start on, jobs of each tenant twice as long as those of the one before.

    In all as many steps as jobs of the mix, at `peak` a second, have in `duration_s`; the same number for each tenant.
    """
    draw = np.random.default_rng(seed)
    num_tenants = min(mix.num_tenants, 8)
    traces = []
    for tenant in range(num_tenants):
        scale = 2.0 ** (tenant % 4) / 2
        output = max(1, round(mix.output_tokens * scale))
        num_jobs = max(1, round(duration_s * peak / num_tenants / scale))
        own = replace(mix, num_tenants=1, num_adapters=max(1, mix.num_adapters // num_tenants), output_tokens=output)
        traces.append(compose("batch", np.zeros(num_jobs), own, draw, first_tenant=tenant))
    return merge("contention", *traces)


TRACES: dict[str, Callable[[int, float, float, Mix], Trace]] = {
    "day": day,
    "ramp": ramp,
    "bursts": bursts,
    "bulk": bulk,
    "contention": contention,
}
