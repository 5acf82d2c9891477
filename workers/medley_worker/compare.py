"""What mixing adapters in a batch gains: the same jobs as mixed batches, and adapter after adapter.

    python -m medley_worker.compare --model DIR --jobs FILE.jsonl [--max-num-seqs N]

A job is a line `{"prompt_token_ids": [...] or "prompt": "...", "adapter_dir": path or null, ...sampling}`. Both
ways run in one engine, in turn, with all adapters resident before; time is what passes inside the engine's steps,
the best round of each counts. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer

from medley.spec.sampling import parse_sampling
from medley_worker.engine.engine import Engine
from medley_worker.engine.requests import Request
from medley_worker.engine.sizing import cpu_threads

ROUNDS = 2


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """One way of running all jobs: seconds inside steps, sequences a step, tokens generated."""

    seconds: float
    rows_per_step: float
    tokens: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    mixed_s: float
    sequential_s: float
    speedup: float
    tokens: int
    rows_per_step_mixed: float
    rows_per_step_sequential: float


def read_jobs(lines: Iterable[str], model_dir: Path) -> Iterator[Request]:
    """Requests whose adapter is the adapter's folder. Raises ValueError naming the line of a bad job."""
    tokenizer: Tokenizer | None = None
    for number, line in enumerate(lines, start=1):
        try:
            job: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise ValueError(f"line {number}: {error}") from error
        adapter_dir = job.pop("adapter_dir", None)
        prompt_token_ids, prompt = job.pop("prompt_token_ids", None), job.pop("prompt", None)
        if (prompt_token_ids is None) == (prompt is None):
            raise ValueError(f"line {number}: wanted either prompt_token_ids or prompt")
        if prompt_token_ids is None:
            tokenizer = tokenizer or _tokenizer(model_dir)
            prompt_token_ids = tokenizer.encode(prompt).ids
        sampling, faults = parse_sampling(job)
        if sampling is None:
            raise ValueError(f"line {number}: " + "; ".join(map(str, faults)))
        yield Request(prompt_token_ids, adapter_dir, sampling)


def _tokenizer(model_dir: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    # Files carry the settings of their training; a prompt is neither cut nor filled up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def compare(model_dir: Path, requests: list[Request], *, max_num_seqs: int = 64, rounds: int = ROUNDS) -> Comparison:
    """Run `requests` both ways, `rounds` times in turn. Their adapters are folders."""
    by_adapter: dict[str | None, list[Request]] = {}
    for request in requests:
        assert request.adapter is None or isinstance(request.adapter, str)
        by_adapter.setdefault(request.adapter, []).append(request)
    folders = [folder for folder in by_adapter if folder is not None]
    engine = Engine.load(model_dir, max_num_seqs=max_num_seqs, adapter_slots=len(folders) or None)
    try:
        for folder in folders:
            engine.add_adapter(folder, folder)
        warm_up = msgspec.structs.replace(requests[0].sampling, max_tokens=1, min_tokens=0, stop=())
        engine.generate([Request([0], folder, warm_up) for folder in folders])
        num_loads = engine.stats().adapter_loads
        mixed: list[Timing] = []
        sequential: list[Timing] = []
        for _ in range(rounds):
            mixed.append(_run(engine, [requests]))
            sequential.append(_run(engine, by_adapter.values()))
        if engine.stats().adapter_loads != num_loads:
            raise RuntimeError("adapters were evicted during the comparison; they must all be resident")
    finally:
        engine.close()
    best, other = min(mixed, key=_seconds), min(sequential, key=_seconds)
    return Comparison(
        mixed_s=best.seconds,
        sequential_s=other.seconds,
        speedup=other.seconds / best.seconds,
        tokens=best.tokens,
        rows_per_step_mixed=best.rows_per_step,
        rows_per_step_sequential=other.rows_per_step,
    )


def _run(engine: Engine, batches: Iterable[list[Request]]) -> Timing:
    before = engine.stats()
    for batch in batches:
        engine.generate(batch)
    after = engine.stats()
    return Timing(
        seconds=after.step_s - before.step_s,
        rows_per_step=(after.rows - before.rows) / max(1, after.steps - before.steps),
        tokens=after.generated_tokens - before.generated_tokens,
    )


def _seconds(timing: Timing) -> float:
    return timing.seconds


def main() -> int:
    """Read the arguments, compare, print. Exit status 2 for bad jobs."""
    parser = argparse.ArgumentParser(prog="medley_worker.compare")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--jobs", type=Path, required=True)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    arguments = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cpu_threads())
    try:
        with arguments.jobs.open(encoding="utf-8") as lines:
            requests = list(read_jobs(lines, arguments.model))
        if not requests:
            raise ValueError("no jobs")
        comparison = compare(arguments.model, requests, max_num_seqs=arguments.max_num_seqs)
    except ValueError as error:
        sys.stderr.write(f"{arguments.jobs}: {error}\n")
        return 2
    sys.stdout.write(msgspec.json.encode(comparison).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
