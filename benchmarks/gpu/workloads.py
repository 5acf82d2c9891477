"""Who asks for what: how popular adapters are, and the requests of Punica's text generation and of a bulk evaluation.

Pure functions of their arguments and a seed; knows no engine. The formulas are those of the Punica paper's
evaluation (section 7): prompt lengths are lognormal (sigma 0.8, scale 18, less 1), total lengths uniform below
`max_len`, and the popularities

    identical   one adapter for all rows
    distinct    an adapter for each row
    uniform     ceil(sqrt(n)) adapters, equally often
    skewed      geometric: each adapter 1.5 times as often as the next
    zipf        n draws from 256 adapters, the i-th with a probability proportional to 1/i (not in the paper)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

POPULARITIES = ("identical", "uniform", "skewed", "distinct", "zipf")
ZIPF_ADAPTERS = 256
SKEW = 1.5
SEED = 20231028


@dataclass(frozen=True, slots=True)
class Job:
    """One request of a workload. adapter: a number from 0, or None for the base."""

    prompt: tuple[int, ...]
    num_new: int
    adapter: int | None


def adapter_counts(num_rows: int, popularity: str, seed: int = SEED) -> list[int]:
    """How many of `num_rows` rows each adapter has, the most popular first. Raises ValueError for an unknown name."""
    if popularity == "identical":
        return [num_rows]
    if popularity == "distinct":
        return [1] * num_rows
    if popularity == "uniform":
        num_adapters = math.ceil(math.sqrt(num_rows))
        share, more = divmod(num_rows, num_adapters)
        return [share + (i < more) for i in range(num_adapters)]
    if popularity == "skewed":
        return _geometric_counts(num_rows)
    if popularity == "zipf":
        weights = 1 / np.arange(1, ZIPF_ADAPTERS + 1)
        drawn = np.random.default_rng(seed).choice(ZIPF_ADAPTERS, num_rows, p=weights / weights.sum())
        counts = np.bincount(drawn)
        return sorted(counts[counts > 0].tolist(), reverse=True)
    raise ValueError(f"popularity: got {popularity!r}, wanted one of {', '.join(POPULARITIES)}")


def _geometric_counts(num_rows: int) -> list[int]:
    """1, 1, 2, 3, 5, ... while they fit, and what is left over to the most popular."""
    counts: list[int] = []
    left = num_rows
    for size in (int(SKEW**i) for i in range(num_rows)):
        if size >= left:
            break
        counts.append(size)
        left -= size
    return sorted([*counts, left], reverse=True)


def adapter_rows(num_rows: int, popularity: str, seed: int = SEED) -> list[int]:
    """The adapter of each row, shuffled."""
    counts = adapter_counts(num_rows, popularity, seed)
    rows = np.repeat(np.arange(len(counts)), counts)
    np.random.default_rng(seed).shuffle(rows)
    return [int(row) for row in rows]


def punica(num_jobs: int, max_len: int, popularity: str, vocab_size: int, seed: int = SEED) -> list[Job]:
    """Punica's text generation. popularity "none": the base alone."""
    rng = np.random.default_rng(seed)
    adapters: list[int | None] = [None] * num_jobs
    # Drawn in either case, so that lengths are the same with and without adapters.
    counts = adapter_counts(num_jobs, "identical" if popularity == "none" else popularity)
    order = np.repeat(np.arange(len(counts)), counts)
    rng.shuffle(order)
    if popularity != "none":
        adapters = [int(adapter) for adapter in order]
    jobs: list[Job] = []
    for adapter in adapters:
        prompt_len = int(min(max(1, rng.lognormal(math.log(18.0), 0.8) - 1.0), max_len - 2))
        total_len = max(prompt_len + 2, int(rng.integers(0, max_len)))
        prompt = tuple(rng.integers(10, vocab_size - 10, prompt_len).tolist())
        jobs.append(Job(prompt, total_len - prompt_len, adapter))
    return jobs


def bulk(num_jobs: int, num_adapters: int, vocab_size: int, seed: int = SEED) -> list[Job]:
    """A bulk evaluation: each adapter equally often in shuffled order, prompts of 64 to 256 tokens, 16 tokens out."""
    rng = np.random.default_rng(seed)
    adapters = np.arange(num_jobs) % num_adapters
    rng.shuffle(adapters)
    lengths = rng.integers(64, 257, num_jobs)
    return [
        Job(tuple(rng.integers(10, vocab_size - 10, length).tolist()), 16, int(adapter))
        for adapter, length in zip(adapters, lengths, strict=True)
    ]
