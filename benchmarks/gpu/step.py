"""`step.json`: a whole decode step through the public Engine, host included.

ms: the time of 200 new tokens less that of 40, over 160, for prompts of 64 tokens; median of three. The mean
context of those steps is 184 tokens. host_ms: the engine's own time a step in which it did not wait for the device.
graph_ms: that step's captured graph alone, replayed at once behind itself where the context is 184. floor_ms:
`floors.step_floor_s`. --batch-invariant: the same of engines whose results are bit-equal whatever shares a batch, in a
file of its own, `step-batch-invariant.json`.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.gpu.engines import Timed, free_memory, requests_of, resident_bytes, running_engine, timed_generate
from benchmarks.gpu.floors import step_floor_s
from benchmarks.gpu.peft_files import RANK, AdapterFiles, adapter_files
from benchmarks.gpu.results import Figure, Row, Run, part_options
from benchmarks.gpu.shapes import CONFIGS, base_model, kv_bytes, weight_bytes
from benchmarks.gpu.timing import timed_event
from benchmarks.gpu.workloads import SEED, Job, adapter_counts, adapter_rows
from benchmarks.record import say
from medley.spec.base_models import BaseModel
from medley_worker import Engine
from medley_worker.engine.step_inputs import bucket_for

KEY = ("model", "batch", "lora")
BATCHES = (32, 64, 1, 8, 16, 128, 256)
LORAS = ("none", "distinct", "identical", "uniform")
PROMPT, SHORT, LONG, ROUNDS = 64, 40, 200, 3
CTX = PROMPT + (SHORT + LONG) // 2
MAX_MODEL_LEN = PROMPT + LONG + 8
WARM_UP, REPLAYS = 3, 20  # of a graph
ACTIVATION_BYTES = 8 << 30  # of a step, of graphs, of the libraries: what adapters and KV cache must leave
START_S = 60.0  # of an engine, its adapters' files and the first step


@dataclass(frozen=True, slots=True)
class Case:
    model: str
    batch: int
    lora: str

    @property
    def adapter_rows(self) -> list[int]:
        return [] if self.lora == "none" else sorted(adapter_rows(self.batch, self.lora))

    @property
    def counts(self) -> list[int]:
        return [] if self.lora == "none" else adapter_counts(self.batch, self.lora)

    def row(self, figure: Figure) -> Row | None:
        return figure.get(model=self.model, batch=self.batch, lora=self.lora)

    def is_wanted(self, figure: Figure) -> bool:
        return figure.wants(model=self.model, batch=self.batch, lora=self.lora)

    def lacks_graph_time(self, figure: Figure) -> bool:
        row = self.row(figure)
        return row is not None and row["graph_ms"] is None

    def jobs(self, num_new: int, vocab_size: int) -> list[Job]:
        rng = np.random.default_rng(SEED)
        adapters: list[int | None] = [*self.adapter_rows] or [None] * self.batch
        return [Job(tuple(rng.integers(10, vocab_size - 10, PROMPT).tolist()), num_new, a) for a in adapters]


class ModelRows:
    """All rows of one model, over one engine."""

    def __init__(self, engine: Engine, model: BaseModel, files: AdapterFiles) -> None:
        self._engine, self._model, self._files = engine, model, files

    def generate(self, case: Case, num_new: int) -> Timed:
        return timed_generate(self._engine, requests_of(case.jobs(num_new, self._model.vocab_size), self._files))

    def measure(self, case: Case) -> Row:
        self.generate(case, SHORT)  # loads adapters, captures what a first step captures
        pairs = [(self.generate(case, SHORT), self.generate(case, LONG)) for _ in range(ROUNDS)]
        step_s = statistics.median((long.seconds - short.seconds) / (LONG - SHORT) for short, long in pairs)
        host_s = statistics.median(long.host_s / long.steps for _, long in pairs)
        return {
            "model": case.model,
            "batch": case.batch,
            "lora": case.lora,
            "adapters": len(case.counts),
            "ctx": CTX,
            "ms": round(step_s * 1e3, 3),
            "graph_ms": None,
            "floor_ms": round(self.floor_s(case) * 1e3, 3),
            "host_ms": round(host_s * 1e3, 3),
        }

    def floor_s(self, case: Case) -> float:
        return step_floor_s(self._model, case.batch, ctx=CTX, adapter_rows=case.counts, rank=RANK)

    def graph_ms(self, case: Case) -> float:
        """The captured step of the case's rows, replayed by itself at the context that `ms` has in the mean."""
        engine, names = self._engine, [str(number) for number in range(case.batch)]
        self.generate(case, 1)  # loads adapters, so that rows begin together
        jobs = case.jobs(LONG, self._model.vocab_size)
        for name, request in zip(names, requests_of(jobs, self._files), strict=True):
            engine.add_request(name, request, stream=False)
        while engine.stats().num_waiting:
            engine.step()
        for _ in range(CTX - PROMPT):
            engine.step()
        forward: Any = engine._parts.forward  # no part of the interface: nobody else needs a graph by itself
        bucket, has_lora = bucket_for(forward._buckets, case.batch), case.lora != "none"
        for _ in range(WARM_UP):
            forward._graphs.replay(bucket, has_lora)
        begin, end = timed_event(), timed_event()
        begin.record()
        for _ in range(REPLAYS):
            forward._graphs.replay(bucket, has_lora)
        end.record()
        torch.cuda.synchronize()
        engine.abort(names)
        return round(float(begin.elapsed_time(end)) / REPLAYS, 3)


def room_for(cases: list[Case], model: BaseModel) -> tuple[int, int]:
    """(rows, resident adapters) of an engine for these cases; fewer adapters than they have where memory is short."""
    num_rows = max(case.batch for case in cases)
    left = free_memory() - weight_bytes(model) - kv_bytes(model, num_rows * (MAX_MODEL_LEN + 16)) - ACTIVATION_BYTES
    return num_rows, max(0, min(max(len(case.counts) for case in cases), left // resident_bytes(model, 1)))


@contextmanager
def rows_of(name: str, cases: list[Case], *, batch_invariant: bool = False) -> Iterator[tuple[ModelRows, list[Case]]]:
    """An engine for these cases of a model, and those of them that its adapter memory is large enough for."""
    with tempfile.TemporaryDirectory() as folder:
        model = base_model(name, Path(folder))
        num_rows, num_adapters = room_for(cases, model)
        fitting = [case for case in cases if len(case.counts) <= num_adapters]
        for case in cases:
            if case not in fitting:
                say(f"left out: {case}: there is memory for {num_adapters} adapters")
        with (
            adapter_files(model) as files,
            running_engine(
                name,
                Path(folder),
                max_num_seqs=num_rows,
                max_model_len=MAX_MODEL_LEN,
                adapter_bytes=resident_bytes(model, num_adapters),
                batch_invariant=batch_invariant,
            ) as engine,
        ):
            yield ModelRows(engine, model, files), fitting


def measure_model(name: str, run: Run, figure: Figure, *, batch_invariant: bool) -> None:
    """All wanted rows of a model, while the budget lasts."""
    every = [Case(name, batch, lora) for batch, lora in itertools.product(BATCHES, LORAS)]
    cases = [case for case in every if case.is_wanted(figure) or case.lacks_graph_time(figure)]
    if not cases or not run.has_time_for(START_S):
        return
    with rows_of(name, cases, batch_invariant=batch_invariant) as (rows, fitting):
        for case in fitting:
            if case.is_wanted(figure):
                if not run.has_time_for(2 * ROUNDS * (SHORT + LONG) * rows.floor_s(case)):
                    return
                figure.add(rows.measure(case))
        for case in fitting:
            row = case.row(figure)
            if row is not None and row["graph_ms"] is None:
                if not run.has_time_for(2 * (CTX - PROMPT) * rows.floor_s(case)):
                    return
                figure.add(row | {"graph_ms": rows.graph_ms(case)})


@click.command()
@click.option("--models", default="7b,8b,13b", show_default=True, help="Which models, in this order.")
@click.option("--batch-invariant", is_flag=True, help="Of engines whose rows depend on no neighbour, bit for bit.")
@part_options
def main(run: Run, models: str, batch_invariant: bool) -> None:
    """Measure whole decode steps."""
    what = "step-batch-invariant" if batch_invariant else "step"
    figure = Figure(what, KEY, run, notes=["bf16, random weights, adapters of rank 16 on all seven projections"])
    for name in models.split(","):
        if name not in CONFIGS:
            raise click.BadParameter(f"got {name!r}, wanted some of {', '.join(CONFIGS)}", param_hint="--models")
        measure_model(name, run, figure, batch_invariant=batch_invariant)


if __name__ == "__main__":
    main()
