"""Engines with random weights on the GPU, and timed calls of `generate`. Everything here is the public interface."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.peft_files import RANK, AdapterFiles
from benchmarks.gpu.shapes import write_config
from benchmarks.gpu.workloads import Job
from medley.spec.base_models import BaseModel
from medley.spec.wire import EngineConfig, EngineStats
from medley_worker import Engine, Request, SamplingParams
from medley_worker.ops.lora_stage import TILE_RANKS
from medley_worker.ops.sgmv_layout import fragment_layout


def resident_bytes(model: BaseModel, num_adapters: int) -> int:
    """Tile memory of so many adapters of rank 16 in bf16."""
    layout = fragment_layout(model)
    return num_adapters * len(layout.groups) * -(-RANK // TILE_RANKS) * layout.tile_elements * 2


@contextmanager
def running_engine(
    name: str,
    folder: Path,
    *,
    max_num_seqs: int,
    max_model_len: int,
    adapter_bytes: int,
    adapter_host_bytes: int | None = None,
    tensor_parallel: int = 1,
    batch_invariant: bool = False,
) -> Iterator[Engine]:
    """An engine over a model of `shapes.CONFIGS`, bf16, its weights made on the device.

    KV cache: as much as `max_num_seqs` sequences of `max_model_len` tokens want and the device has.
    """
    free_memory()
    engine = Engine(
        EngineConfig(
            model_dir=str(write_config(name, folder)),
            device="cuda",
            dtype="bfloat16",
            load_format="random",
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            adapter_bytes=adapter_bytes,
            adapter_host_bytes=adapter_host_bytes,
            tensor_parallel=tensor_parallel,
            batch_invariant=batch_invariant,
        )
    )
    try:
        yield engine
    finally:
        engine.close()


def free_memory() -> int:
    """Bytes of the device that a next engine can have. Those of one before are given back once nobody holds it."""
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


@dataclass(frozen=True, slots=True)
class Timed:
    """One call of `generate`: its seconds, the tokens it brought, and what the engine counted meanwhile."""

    seconds: float
    num_tokens: int
    steps: int
    host_s: float
    loads: int
    evictions: int
    load_s: float
    preemptions: int


def timed_generate(engine: Engine, requests: list[Request]) -> Timed:
    """Run the requests to their full lengths. Raises RuntimeError for one that failed or ended early."""
    before = engine.stats()
    started = time.perf_counter()
    completions = engine.generate(requests)
    seconds = time.perf_counter() - started
    for request, completion in zip(requests, completions, strict=True):
        if completion.error is not None or len(completion.token_ids) != request.sampling.max_tokens:
            raise RuntimeError(
                f"a request of {len(request.prompt_token_ids)} + {request.sampling.max_tokens} tokens"
                f" brought {len(completion.token_ids)}, error {completion.error}"
            )
    return _timed(seconds, sum(len(c.token_ids) for c in completions), before, engine.stats())


def requests_of(jobs: Sequence[Job], files: AdapterFiles) -> list[Request]:
    """The requests of these jobs, greedy, to their full lengths."""
    return [
        Request(
            job.prompt,
            None if job.adapter is None else files.ref(job.adapter),
            SamplingParams(max_tokens=job.num_new, ignore_eos=True),
        )
        for job in jobs
    ]


def _timed(seconds: float, num_tokens: int, before: EngineStats, after: EngineStats) -> Timed:
    return Timed(
        seconds=seconds,
        num_tokens=num_tokens,
        steps=after.steps - before.steps,
        host_s=after.host_s - before.host_s,
        loads=after.adapter_loads - before.adapter_loads,
        evictions=after.adapter_evictions - before.adapter_evictions,
        load_s=after.adapter_load_s - before.adapter_load_s,
        preemptions=after.preemptions - before.preemptions,
    )
