"""`adapters.json`: what it takes to load an adapter, and what too little memory for adapters costs. 7B shape, rank 16.

load: the time of a request for one token whose adapter (80 MB) is read from disk, or copied from host memory, beyond
that of the same request with the adapter resident. oversubscribed: 1,024 requests in arrival order over 64 and 256
adapters on tiles for 16 of them, host copies warm, against the same with all resident.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from pathlib import Path

import click
import numpy as np

from benchmarks.gpu.engines import Timed, requests_of, resident_bytes, running_engine, timed_generate
from benchmarks.gpu.peft_files import RANK, AdapterFiles, adapter_files
from benchmarks.gpu.results import Figure, Run, part_options
from benchmarks.gpu.shapes import adapter_weight_bytes, base_model
from benchmarks.gpu.workloads import SEED, Job, punica
from medley.spec.adapters import WEIGHTS_NAME
from medley.spec.base_models import BaseModel
from medley_worker import Engine

MODEL, ROWS, MAX_LEN, NUM_REQUESTS = "7b", 256, 512, 1024
FEW, MANY = 16, 256  # adapters that there is memory for
LOADED = range(1, 9)  # adapters that are loaded; 0 warms up
START_S = 30.0


def arrivals(num_adapters: int, vocab_size: int) -> list[Job]:
    """1,024 requests of Punica's lengths, each adapter equally often, shuffled."""
    adapters = np.arange(NUM_REQUESTS) % num_adapters
    np.random.default_rng(SEED).shuffle(adapters)
    jobs = punica(NUM_REQUESTS, MAX_LEN, "none", vocab_size)
    return [Job(job.prompt, job.num_new, int(adapter)) for job, adapter in zip(jobs, adapters, strict=True)]


def drop_from_page_cache(path: Path) -> None:
    """Make the next read of a file one of the disk's (where it lies on one)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Loads:
    """Requests for one token, one adapter after another, on tiles for one."""

    def __init__(self, engine: Engine, files: AdapterFiles) -> None:
        self._engine, self._files = engine, files

    def measure(self, figure: Figure, model: BaseModel) -> None:
        self._request(0)
        for number in LOADED:
            drop_from_page_cache(self._files.path(number) / WEIGHTS_NAME)
        resident: list[Timed] = []
        disk: list[Timed] = []
        for number in LOADED:
            disk.append(self._request(number))
            resident.append(self._request(number))
        host = [self._request(number) for number in LOADED]
        base_s = statistics.median(timed.seconds for timed in resident)
        for source, timings in (("disk", disk), ("host", host)):
            loads = sum(timed.loads for timed in timings)
            figure.add(
                {
                    "what": "load",
                    "source": source,
                    "adapters": 1,
                    "adapter_mb": round(adapter_weight_bytes(model, RANK) / 1e6, 1),
                    "ms": round((statistics.median(timed.seconds for timed in timings) - base_s) * 1e3, 2),
                    "request_ms_resident": round(base_s * 1e3, 2),
                    "engine_load_ms": round(sum(timed.load_s for timed in timings) / max(1, loads) * 1e3, 2),
                    "loads": loads,
                }
            )

    def _request(self, number: int) -> Timed:
        return timed_generate(self._engine, requests_of([Job(tuple(range(10, 18)), 1, number)], self._files))


def measure_loads(run: Run, figure: Figure, model: BaseModel, folder: Path) -> None:
    """Rows `load`."""
    if not any(figure.wants(what="load", source=source, adapters=1) for source in ("disk", "host")):
        return
    if not run.has_time_for(START_S):
        return
    with (
        adapter_files(model, on_disk=True) as files,
        running_engine(
            MODEL, folder, max_num_seqs=4, max_model_len=256, adapter_bytes=resident_bytes(model, 1)
        ) as engine,
    ):
        Loads(engine, files).measure(figure, model)


def measure_throughput(run: Run, figure: Figure, model: BaseModel, folder: Path, room: int) -> None:
    """Rows `throughput` with tiles for `room` adapters."""
    source = f"tiles for {room}"
    wanted = [n for n in (64, MANY) if figure.wants(what="throughput", source=source, adapters=n)]
    if not wanted or not run.has_time_for(START_S):
        return
    with (
        adapter_files(model) as files,
        running_engine(
            MODEL,
            folder,
            max_num_seqs=ROWS,
            max_model_len=MAX_LEN,
            adapter_bytes=resident_bytes(model, room),
            adapter_host_bytes=resident_bytes(model, MANY + 1),
        ) as engine,
    ):
        for num_adapters in wanted:
            if not run.has_time_for(2 * START_S):
                return
            requests = requests_of(arrivals(num_adapters, model.vocab_size), files)
            timed_generate(engine, requests)  # host copies are made
            timed = timed_generate(engine, requests)
            tok_s = timed.num_tokens / timed.seconds
            resident = figure.get(what="throughput", source=f"tiles for {MANY}", adapters=num_adapters)
            figure.add(
                {
                    "what": "throughput",
                    "source": source,
                    "adapters": num_adapters,
                    "requests": NUM_REQUESTS,
                    "tok_s": round(tok_s),
                    "of_resident": 1.0 if room == MANY or resident is None else round(tok_s / resident["tok_s"], 3),
                    "steps": timed.steps,
                    "loads": timed.loads,
                    "evictions": timed.evictions,
                }
            )


@click.command()
@part_options
def main(run: Run) -> None:
    """Measure loads of adapters and throughput with too little memory for them."""
    notes = [f"{MODEL} shape, bf16, rank 16 on all seven projections; throughput of the second of two passes"]
    figure = Figure("adapters", ("what", "source", "adapters"), run, notes=notes)
    with tempfile.TemporaryDirectory() as folder:
        model = base_model(MODEL, Path(folder))
        measure_loads(run, figure, model, Path(folder))
        for room in (MANY, FEW):  # all resident first: the other is held against it
            measure_throughput(run, figure, model, Path(folder), room)


if __name__ == "__main__":
    main()
