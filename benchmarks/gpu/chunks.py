"""`chunks.json`: what a prompt costs the rows that decode beside it. 7B shape, a prompt in each step.

Steps with prompt chunks replay graphs with attention between them up to 512 tokens, and run operator by operator
beyond; steps of decode rows replay one graph. ms is the time of a step, the mean of 16 that carry a prompt of `chunk`
tokens each (0: none), host_ms the engine's own time in it. Where host_ms is well below ms, launching costs nothing.
The largest chunk is what a step takes at the most, so its ms is the longest that decoding stalls for prompts.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks.gpu.engines import requests_of, resident_bytes, running_engine
from benchmarks.gpu.peft_files import AdapterFiles, adapter_files
from benchmarks.gpu.results import Figure, Row, Run, part_options
from benchmarks.gpu.shapes import base_model
from benchmarks.gpu.workloads import SEED, Job
from medley_worker import Engine

KEY = ("batch", "lora", "chunk")
MODEL, SPARE_ROWS, MAX_LEN = "7b", 32, 4096
BATCHES = (32, 128)  # rows that decode
LORAS = ("none", "distinct")
CHUNKS = (0, 64, 256, 512, 1024)
STEPS, ROUNDS = 16, 3
NUM_NEW = 2_000  # of the rows that decode: they outlast what is measured
START_S, ROW_S = 60.0, 15.0


class Decoding:
    """An engine in which so many rows decode."""

    def __init__(self, engine: Engine, files: AdapterFiles, lora: str, num_rows: int) -> None:
        self._engine, self._files, self._num_rows = engine, files, num_rows
        self._is_distinct = lora == "distinct"
        self._rng = np.random.default_rng(SEED)
        self._ids = itertools.count()
        # Adapters come first: rows that waited for theirs would have shorter contexts than the others.
        self._load(range(num_rows + 1))
        self._names = [self._add(number, 64, NUM_NEW) for number in range(num_rows)]
        while engine.stats().num_waiting:
            engine.step()
        self._run(8, 0)

    def close(self) -> None:
        self._engine.abort(self._names)

    def measure(self, chunk: int) -> tuple[float, float]:
        """(ms, host ms) a step."""
        self._run(2, chunk)  # what a first step of its kind builds or captures
        rounds = [self._run(STEPS, chunk) for _ in range(ROUNDS)]
        return statistics.median(ms for ms, _ in rounds), statistics.median(host for _, host in rounds)

    def _load(self, adapters: range) -> None:
        for number in adapters:
            self._add(number, 1, 1)
        while self._engine.has_work:
            self._engine.step()

    def _run(self, num_steps: int, chunk: int) -> tuple[float, float]:
        torch.cuda.synchronize()
        before, started = self._engine.stats(), time.perf_counter()
        for _ in range(num_steps):
            if chunk:
                self._add(self._num_rows, chunk, 1)
            self._engine.step()
        torch.cuda.synchronize()
        seconds, after = time.perf_counter() - started, self._engine.stats()
        return seconds / num_steps * 1e3, (after.host_s - before.host_s) / num_steps * 1e3

    def _add(self, adapter: int, num_prompt: int, num_new: int) -> str:
        prompt = tuple(self._rng.integers(10, self._engine.vocab_size - 10, num_prompt).tolist())
        (request,) = requests_of([Job(prompt, num_new, adapter if self._is_distinct else None)], self._files)
        name = str(next(self._ids))
        self._engine.add_request(name, request, stream=False)
        return name


def rows(engine: Engine, files: AdapterFiles, lora: str, batch: int, run: Run, figure: Figure) -> Iterator[Row]:
    """The wanted rows, while the budget lasts."""
    largest = engine.sizes.max_num_batched_tokens - batch
    chunks = (*(c for c in CHUNKS if c < largest), largest)
    wanted = [chunk for chunk in chunks if figure.wants(batch=batch, lora=lora, chunk=chunk)]
    if not wanted or not run.has_time_for(ROW_S):
        return
    decoding = Decoding(engine, files, lora, batch)
    for chunk in wanted:
        if run.has_time_for(ROW_S):
            ms, host_ms = decoding.measure(chunk)
            yield {
                "batch": batch,
                "lora": lora,
                "chunk": chunk,
                "ms": round(ms, 3),
                "host_ms": round(host_ms, 3),
            }
    decoding.close()


@click.command()
@part_options
def main(run: Run) -> None:
    """Measure steps that carry prompts beside decode rows."""
    figure = Figure("chunks", KEY, run, notes=[f"{MODEL} shape, bf16, random weights, an adapter of rank 16 a row"])
    if not run.has_time_for(START_S):
        return
    with tempfile.TemporaryDirectory() as folder:
        model = base_model(MODEL, Path(folder))
        with (
            adapter_files(model) as files,
            running_engine(
                MODEL,
                Path(folder),
                max_num_seqs=max(BATCHES) + SPARE_ROWS,
                max_model_len=MAX_LEN,
                adapter_bytes=resident_bytes(model, max(BATCHES) + 1),
            ) as engine,
        ):
            for batch, lora in itertools.product(BATCHES, LORAS):
                for row in rows(engine, files, lora, batch, run, figure):
                    figure.add(row)


if __name__ == "__main__":
    main()
