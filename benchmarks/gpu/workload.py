"""`workload.json`: output tokens/s and jobs/s of whole workloads through the public Engine, 7B shape, 256 rows.

punica: text generation after the Punica paper, sequences of at most 1,024 tokens; 256 requests, of which the second of
two passes counts, and 1,024 requests over at most 256 adapters, in one pass after those. bulk: 2,048 requests in
shuffled order over 256 adapters, prompts of 64 to 256 tokens, 16 tokens out.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.gpu.engines import Timed, requests_of, resident_bytes, running_engine, timed_generate
from benchmarks.gpu.peft_files import AdapterFiles, adapter_files
from benchmarks.gpu.results import Figure, Row, Run, part_options
from benchmarks.gpu.shapes import base_model
from benchmarks.gpu.workloads import Job, bulk, punica
from benchmarks.record import say
from medley_worker import Engine

KEY = ("workload", "popularity", "requests")
MODEL, ROWS, MAX_LEN, NUM_ADAPTERS = "7b", 256, 1024, 256
POPULARITIES = ("none", "distinct", "identical", "skewed", "uniform")
START_S = 45.0
SLOW_TOK_S = 4000.0  # a rate that is surely reached, to see whether a row still fits into the budget


@dataclass(frozen=True, slots=True)
class Case:
    """One row. passes: how often it is run; the last counts."""

    workload: str
    popularity: str
    requests: int
    passes: int

    def jobs(self, vocab_size: int) -> list[Job]:
        if self.workload == "bulk":
            return bulk(self.requests, NUM_ADAPTERS, vocab_size)
        jobs = punica(self.requests, MAX_LEN, self.popularity, vocab_size)
        return [Job(j.prompt, j.num_new, None if j.adapter is None else j.adapter % NUM_ADAPTERS) for j in jobs]


CASES = [
    *(Case("punica", popularity, 256, passes=2) for popularity in POPULARITIES),
    Case("bulk", "shuffled", 2048, passes=2),
    *(Case("punica", popularity, 1024, passes=1) for popularity in POPULARITIES),
]


def measure(case: Case, engine: Engine, files: AdapterFiles) -> Row:
    """Run a workload and count."""
    jobs = case.jobs(engine.vocab_size)
    requests = requests_of(jobs, files)
    timed: Timed | None = None
    for _ in range(case.passes):
        timed = timed_generate(engine, requests)
    assert timed is not None, "a case has a pass"
    return {
        "workload": case.workload,
        "popularity": case.popularity,
        "requests": case.requests,
        "adapters": len({job.adapter for job in jobs} - {None}),
        "output_tokens": timed.num_tokens,
        "seconds": round(timed.seconds, 2),
        "tok_s": round(timed.num_tokens / timed.seconds),
        "jobs_s": round(len(jobs) / timed.seconds, 1),
        "steps": timed.steps,
        "host_s": round(timed.host_s, 2),
        "preemptions": timed.preemptions,
        "adapter_loads": timed.loads,
    }


@click.command()
@part_options
def main(run: Run) -> None:
    """Measure whole workloads."""
    figure = Figure("workload", KEY, run, notes=[f"{MODEL} shape, bf16, random weights, {ROWS} rows, rank 16"])
    wanted = [c for c in CASES if figure.wants(workload=c.workload, popularity=c.popularity, requests=c.requests)]
    if not wanted or not run.has_time_for(START_S):
        say(f"{figure.path} has all rows; --again measures them once more" if not wanted else "nothing was measured")
        return
    with tempfile.TemporaryDirectory() as folder:
        model = base_model(MODEL, Path(folder))
        with (
            adapter_files(model) as files,
            running_engine(
                MODEL,
                Path(folder),
                max_num_seqs=ROWS,
                max_model_len=MAX_LEN,
                adapter_bytes=resident_bytes(model, NUM_ADAPTERS),
            ) as engine,
        ):
            for case in wanted:
                num_tokens = sum(job.num_new for job in case.jobs(model.vocab_size))
                if not run.has_time_for(case.passes * num_tokens / SLOW_TOK_S):
                    return
                figure.add(measure(case, engine, files))


if __name__ == "__main__":
    main()
