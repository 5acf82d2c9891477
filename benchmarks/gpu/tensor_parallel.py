"""`<gpu>x2-tensor-parallel.json`: decode steps of one model on one and on two GPUs, and how far log-probabilities part.

ms: as in `step.json`, the time of a long run less that of a short one over the tokens between, prompts of 64 tokens;
tok_s: the rows over it. floor_ms: of the rank that does most, its bytes alone, nothing for what ranks tell each other.
logprob_error: mean and 99th percentile of the difference from one GPU's, of 32 jobs' tokens as one GPU draws them:
scored as prompts by both, and as two GPUs draw them while they draw the same. Null where one GPU has no room.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks.gpu.engines import requests_of, running_engine, timed_generate
from benchmarks.gpu.floors import step_floor_s
from benchmarks.gpu.peft_files import RANK, AdapterFiles, adapter_files
from benchmarks.gpu.results import Figure, Row, Run, part_options
from benchmarks.gpu.shapes import base_model
from benchmarks.gpu.workloads import SEED, Job, adapter_counts, adapter_rows
from medley.spec.base_models import BaseModel
from medley_worker import Completion, Engine, Request, SamplingParams
from medley_worker.models.sharding import shard_of
from medley_worker.ops.lora_stage import TILE_RANKS
from medley_worker.ops.sgmv_layout import fragment_layout

KEY = ("model", "gpus", "batch", "popularity")
BATCH = 32
POPULARITIES = ("none", "distinct", "identical", "uniform", "skewed")
PROMPT = 64
HOST_BYTES = 4 << 30  # adapters are read once
NUM_COMPARED = 24  # tokens of each of the 32 jobs


@dataclass(frozen=True, slots=True)
class Plan:
    """One model on so many GPUs. load_s: seconds that its engine and adapters take to come, at the most."""

    model: str
    gpus: int
    load_s: float
    short: int  # new tokens of the short runs
    long: int
    rounds: int
    num_different: int  # adapters' files
    popularities: tuple[str, ...] = POPULARITIES

    @property
    def max_model_len(self) -> int:
        return PROMPT + self.long + 8

    @property
    def ctx(self) -> float:
        return PROMPT + (self.short + self.long) / 2


PLANS = (
    Plan("7b", 1, 60, 40, 200, 3, 8),
    Plan("7b", 2, 75, 40, 200, 3, 8),
    Plan("70b", 2, 150, 24, 88, 2, 2),
    Plan("70b-8l", 1, 40, 40, 120, 2, 2, ("distinct",)),
    Plan("70b-8l", 2, 50, 40, 120, 2, 2, ("distinct",)),
)


class Measured:
    """All rows of one plan, over one engine."""

    def __init__(self, plan: Plan, engine: Engine, model: BaseModel, files: AdapterFiles) -> None:
        self._plan, self._engine, self._model, self._files = plan, engine, model, files
        self._part = shard_of(model, size=plan.gpus).part

    def floor_s(self, popularity: str) -> float:
        counts = [] if popularity == "none" else adapter_counts(BATCH, popularity)
        return step_floor_s(self._part, BATCH, ctx=self._plan.ctx, adapter_rows=counts, rank=RANK)

    def row(self, popularity: str, errors: Row | None) -> Row:
        plan = self._plan
        self._seconds(popularity, plan.short)  # loads adapters
        pairs = [
            (self._seconds(popularity, plan.short), self._seconds(popularity, plan.long)) for _ in range(plan.rounds)
        ]
        step_s = statistics.median((long - short) / (plan.long - plan.short) for short, long in pairs)
        return {
            "model": plan.model,
            "gpus": plan.gpus,
            "batch": BATCH,
            "popularity": popularity,
            "adapters": 0 if popularity == "none" else len(adapter_counts(BATCH, popularity)),
            "ctx": plan.ctx,
            "ms": round(step_s * 1e3, 3),
            "tok_s": round(BATCH / step_s),
            "floor_ms": round(self.floor_s(popularity) * 1e3, 3),
            "logprob_error": errors,
        }

    def _seconds(self, popularity: str, num_new: int) -> float:
        jobs = jobs_of(popularity, num_new, self._model.vocab_size)
        return timed_generate(self._engine, requests_of(jobs, self._files)).seconds

    def draw(self) -> list[Completion]:
        """What the distinct jobs draw, greedily."""
        jobs = jobs_of("distinct", NUM_COMPARED, self._model.vocab_size)
        return self._engine.generate(requests_of(jobs, self._files))

    def score(self, drawn: Sequence[Sequence[int]]) -> list[Completion]:
        """These tokens after the distinct jobs' prompts, scored."""
        jobs = jobs_of("distinct", NUM_COMPARED, self._model.vocab_size)
        asked = [
            Request((*r.prompt_token_ids, *tokens), r.adapter, SamplingParams(), num_continuation=len(tokens))
            for r, tokens in zip(requests_of(jobs, self._files), drawn, strict=True)
        ]
        return self._engine.generate(asked)


def jobs_of(popularity: str, num_new: int, vocab_size: int) -> list[Job]:
    rng = np.random.default_rng(SEED)
    adapters: list[int | None] = [None] * BATCH
    if popularity != "none":
        adapters = sorted(adapter_rows(BATCH, popularity))  # type: ignore[assignment]
    return [Job(tuple(rng.integers(10, vocab_size - 10, PROMPT).tolist()), num_new, a) for a in adapters]


@dataclass(frozen=True, slots=True)
class Reference:
    """One GPU's: what it drew, and its scores of that."""

    drawn: list[Completion]
    scored: list[Completion]

    @property
    def tokens(self) -> list[list[int]]:
        return [completion.token_ids for completion in self.drawn]


def errors_of(reference: Reference, scored: list[Completion], drawn: list[Completion]) -> Row:
    """How far two GPUs' log-probabilities are from one's."""
    in_prompt = [abs(a - b) for x, y in zip(reference.scored, scored, strict=True) for a, b in _pairs(x, y)]
    together: list[float] = []
    num_same = 0
    for one, two in zip(reference.drawn, drawn, strict=True):
        same = sum(
            1 for _ in itertools.takewhile(lambda p: p[0] == p[1], zip(one.token_ids, two.token_ids, strict=True))
        )
        num_same += same == len(one.token_ids)
        together += [abs(a - b) for a, b in list(_pairs(one, two))[:same]]
    # Of one GPU alone: what its own two ways, by chunks and by decode steps, part the same tokens' by.
    own = [abs(a - b) for x, y in zip(reference.scored, reference.drawn, strict=True) for a, b in _pairs(x, y)]
    return {
        "scored": _summary(in_prompt),
        "drawn": _summary(together),
        "one_gpu_scored_and_drawn": _summary(own),
        "same_tokens": f"{num_same} of {len(drawn)}",
    }


def _pairs(one: Completion, two: Completion) -> zip[tuple[float, float]]:
    return zip(one.logprobs, two.logprobs, strict=True)


def _summary(errors: list[float]) -> Row:
    return {
        "mean": round(float(np.mean(errors)), 5) if errors else None,
        "p99": round(float(np.quantile(errors, 0.99)), 5) if errors else None,
        "tokens": len(errors),
    }


def tile_bytes(model: BaseModel, gpus: int, num_adapters: int) -> int:
    """Memory of each GPU for so many adapters of rank 16 in bf16."""
    layout = fragment_layout(shard_of(model, size=gpus).part)
    return num_adapters * len(layout.groups) * -(-RANK // TILE_RANKS) * layout.tile_elements * 2


def measure(plan: Plan, run: Run, figure: Figure, references: dict[str, Reference]) -> None:
    """All wanted rows of a plan, while the budget lasts; and one GPU's reference where its rows are."""
    wanted = [p for p in plan.popularities if figure.wants(model=plan.model, gpus=plan.gpus, batch=BATCH, popularity=p)]
    is_reference = plan.gpus == 1 and any(
        other.model == plan.model and other.gpus > 1 and _is_wanted(other, figure) for other in PLANS
    )
    if not (wanted or is_reference) or not run.has_time_for(plan.load_s):
        return
    with tempfile.TemporaryDirectory() as folder:
        model = base_model(plan.model, Path(folder))
        with (
            adapter_files(model, num_different=plan.num_different) as files,
            running_engine(
                plan.model,
                Path(folder),
                max_num_seqs=BATCH,
                max_model_len=plan.max_model_len,
                adapter_bytes=tile_bytes(model, plan.gpus, BATCH),
                adapter_host_bytes=HOST_BYTES,
                tensor_parallel=plan.gpus,
            ) as engine,
        ):
            measured = Measured(plan, engine, model, files)
            errors: Row | None = None
            if is_reference:
                drawn = measured.draw()
                references[plan.model] = Reference(drawn, measured.score([c.token_ids for c in drawn]))
            elif plan.model in references:
                reference = references[plan.model]
                errors = errors_of(reference, measured.score(reference.tokens), measured.draw())
            for popularity in wanted:
                num_steps = plan.rounds * (plan.short + plan.long) + plan.short
                if not run.has_time_for(2 * num_steps * measured.floor_s(popularity)):
                    return
                figure.add(measured.row(popularity, errors if popularity == "distinct" else None))


def _is_wanted(plan: Plan, figure: Figure) -> bool:
    return any(figure.wants(model=plan.model, gpus=plan.gpus, batch=BATCH, popularity=p) for p in plan.popularities)


@click.command()
@click.option("--models", default="7b,70b,70b-8l", show_default=True, help="Which models, in the order of the plans.")
@part_options
def main(run: Run, models: str) -> None:
    """Measure one model on two GPUs beside one."""
    num_devices = torch.cuda.device_count()
    if num_devices < 2:
        raise click.ClickException(f"this part wants two GPUs of one host; torch finds {num_devices}")
    names = models.split(",")
    unknown = set(names) - {plan.model for plan in PLANS}
    if unknown:
        raise click.BadParameter(f"got {', '.join(sorted(unknown))}", param_hint="--models")
    notes = ["bf16, random weights, adapters of rank 16 on all seven projections; NCCL, one process a GPU"]
    figure = Figure("tensor-parallel", KEY, run, notes=notes, num_devices=2)
    references: dict[str, Reference] = {}
    for plan in PLANS:
        if plan.model in names:
            measure(plan, run, figure, references)


if __name__ == "__main__":
    main()
