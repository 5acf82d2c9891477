"""How often a move changes what a job says: greedy jobs are drained in mid-generation and go on in other company.

A drain gives a job back with its tokens; the next worker computes them anew as a prompt, among other rows, and goes on.
Where results depend on neighbours, a near-tie may then fall the other way. For each level of determinism this counts
the jobs whose tokens differ from those of a run that nobody moved. In float32 on CPU, and with batch_invariant, that
must be none: the command ends with status 1 otherwise.

On CPU with the demo's model and adapters; with --device cuda on a model of Llama-2-7B's shape with random weights,
which has more near-ties than a trained one, or on --model with the PEFT folders in --adapters.
"""

from __future__ import annotations

import gc
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks import record
from medley.spec.jobs import Checkpoint
from medley.spec.wire import AdapterRef, EngineConfig
from medley_worker import Engine, Request, SamplingParams

ASSETS = Path(__file__).resolve().parents[1] / "app" / "medley" / "demo" / "assets"
LEVELS = ("default", "batch_invariant")
MAX_PROMPT = 48
KEY = ("level", "model", "device", "dtype", "rows", "tokens")
Adapter = AdapterRef | str


@dataclass(frozen=True)
class Subject:
    """What is measured: a model's folder and adapters, whose texts have tokens below `vocab_size`."""

    name: str
    model_dir: Path
    adapters: Sequence[Adapter]
    load_format: str
    vocab_size: int


@dataclass(frozen=True)
class Counts:
    """Of one level. moved: jobs that were given back with tokens; parted: those that then said something else.

    first_at: tokens between a parted job's move and its first other token, on the average.
    """

    jobs: int
    moved: int
    parted: int
    first_at: float | None


def measure(engine: Engine, subject: Subject, *, num_jobs: int, num_tokens: int, seed: int) -> Counts:
    """Moves `num_jobs` jobs, half of the engine's rows at a time, each wave after a random number of steps."""
    rng = random.Random(seed)
    jobs, company = ([_request(subject, rng, num_tokens) for _ in range(num_jobs)] for _ in range(2))
    still = [tuple(done.token_ids) for done in engine.generate(jobs)]
    num_rows = max(1, engine.config.max_num_seqs // 2)
    num_moved, gaps = 0, []
    for start in range(0, num_jobs, num_rows):
        wave = range(start, min(num_jobs, start + num_rows))
        kept, said = _drain(engine, {n: jobs[n] for n in wave}, rng.randrange(1, num_tokens))
        said |= _go_on(engine, {n: jobs[n] for n in kept}, kept, [company[n] for n in wave], rng)
        for number, checkpoint in kept.items():
            if checkpoint.token_ids:
                num_moved += 1
                gap = _first_difference(still[number], said[number])
                if gap is not None:
                    gaps.append(gap - len(checkpoint.token_ids))
    return Counts(num_jobs, num_moved, len(gaps), sum(gaps) / len(gaps) if gaps else None)


def _request(subject: Subject, rng: random.Random, num_tokens: int) -> Request:
    """Greedy, to its full length; one in eight is the base's."""
    prompt = tuple(rng.randrange(subject.vocab_size) for _ in range(rng.randint(4, MAX_PROMPT)))
    adapter = None if rng.random() < 0.125 else rng.choice(subject.adapters)
    return Request(prompt, adapter, SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True))


def _drain(
    engine: Engine, jobs: dict[int, Request], num_steps: int
) -> tuple[dict[int, Checkpoint], dict[int, tuple[int, ...]]]:
    """Runs `jobs` until so many steps have computed something, and gives them back. Also returns what ended before."""
    for number, request in jobs.items():
        engine.add_request(number, request, stream=False)
    said: dict[int, tuple[int, ...]] = {}
    since = engine.stats().steps
    while engine.has_work and engine.stats().steps < since + num_steps:
        said |= {out.request_id: tuple(out.token_ids) for out in engine.step() if out.is_finished}  # type: ignore[misc]
    kept: dict[int, Checkpoint] = engine.release()  # type: ignore[assignment]
    said |= {out.request_id: tuple(out.token_ids) for out in engine.take_outputs() if out.is_finished}  # type: ignore[misc]
    return kept, said


def _go_on(
    engine: Engine,
    jobs: dict[int, Request],
    kept: dict[int, Checkpoint],
    company: Sequence[Request],
    rng: random.Random,
) -> dict[int, tuple[int, ...]]:
    """Runs given-back jobs to their ends, in another order and among other jobs: what another worker does."""
    for number, request in enumerate(company):
        engine.add_request(("company", number), request, stream=False)
    for number in rng.sample(list(jobs), len(jobs)):
        engine.add_request(number, jobs[number], kept[number], stream=False)
    said: dict[int, tuple[int, ...]] = {}
    while engine.has_work:
        for out in engine.step():
            if out.error is not None:
                raise RuntimeError(f"a job failed: {out.error}")
            if out.is_finished and isinstance(out.request_id, int):
                said[out.request_id] = tuple(out.token_ids)
    return said


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    if len(one) != len(other):
        raise RuntimeError(f"a job of {len(one)} tokens has {len(other)} after its move")
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


def _subject(
    stack: ExitStack, device: str, model: Path | None, name: str | None, adapters: Path | None, num: int
) -> Subject:
    if model is not None:
        folders = sorted(path for path in (adapters or ASSETS / "none").glob("*/") if path.is_dir())[:num]
        if not folders:
            raise click.BadParameter("wanted a folder of PEFT folders", param_hint="--adapters")
        return Subject(
            name or model.name, model, [str(folder) for folder in folders], "safetensors", _vocab_size(model)
        )
    if device == "cpu":
        folders = sorted((ASSETS / "adapters").iterdir())[:num]
        # Its adapters know printable text alone.
        return Subject("demo", ASSETS / "model", [str(folder) for folder in folders], "safetensors", 127)
    from benchmarks.gpu.peft_files import adapter_files
    from benchmarks.gpu.shapes import base_model

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    shape = base_model("7b", folder)
    files = stack.enter_context(adapter_files(shape))
    return Subject("7b, random", folder, [files.ref(n) for n in range(num)], "random", shape.vocab_size)


def _vocab_size(model_dir: Path) -> int:
    from medley.spec.base_models import read_base_model

    return read_base_model(model_dir).vocab_size


def _levels(subject: Subject, device: str, dtype: str, num_rows: int, num_tokens: int) -> Iterator[tuple[str, Engine]]:
    """An engine of each level; its memory is free afterwards."""
    for level in LEVELS:
        engine = Engine(
            EngineConfig(
                model_dir=str(subject.model_dir),
                device=device,
                dtype=dtype,
                load_format=subject.load_format,
                max_num_seqs=num_rows,
                max_model_len=MAX_PROMPT + num_tokens,
                adapter_slots=len(subject.adapters),
                batch_invariant=level == "batch_invariant",
            )
        )
        try:
            yield level, engine
        finally:
            engine.close()
            del engine
            gc.collect()
            if device != "cpu":
                torch.cuda.empty_cache()


def _known(engine: Engine, subject: Subject) -> Subject:
    """The subject with the names by which the engine knows adapters that are folders."""
    for adapter in subject.adapters:
        if isinstance(adapter, str):
            engine.add_adapter(Path(adapter).name, adapter)
    names = [Path(a).name if isinstance(a, str) else a for a in subject.adapters]
    return Subject(subject.name, subject.model_dir, names, subject.load_format, subject.vocab_size)


def _rows(name: str, folder: Path | None) -> list[dict[str, Any]]:
    """What was measured there before, of other models and sizes too."""
    path = (folder or record.RESULTS) / f"{name}-migration.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    return rows


def _command(device: str, has_model: bool, num_adapters: int) -> str:
    """What makes these rows, folders apart; sizes are in the rows."""
    command = f"python -m benchmarks.migration --device {device}"
    return f"{command} --model MODEL --adapters ADAPTERS --num-adapters {num_adapters}" if has_model else command


@click.command()
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--dtype", help="[default: float32 on cpu, bfloat16 on cuda]")
@click.option("--model", type=click.Path(file_okay=False, path_type=Path), help="A Hugging Face folder.")
@click.option("--name", help="What the result calls --model.  [default: its folder's name]")
@click.option("--adapters", "adapter_dir", type=click.Path(file_okay=False, path_type=Path), help="Of --model.")
@click.option("--num-adapters", default=16, show_default=True)
@click.option("--jobs", "num_jobs", default=256, show_default=True)
@click.option("--rows", "num_rows", default=64, show_default=True, help="That the engine decodes together.")
@click.option("--tokens", "num_tokens", default=96, show_default=True, help="Of each job.")
@click.option("--seed", default=20261122, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the result.")
def main(
    device: str,
    dtype: str | None,
    model: Path | None,
    name: str | None,
    adapter_dir: Path | None,
    num_adapters: int,
    num_jobs: int,
    num_rows: int,
    num_tokens: int,
    seed: int,
    out: Path | None,
) -> None:
    """Count the jobs that a move makes say something else, and write the result."""
    dtype = dtype or ("float32" if device == "cpu" else "bfloat16")
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        subject = _subject(stack, device, model, name, adapter_dir, num_adapters)
        for level, engine in _levels(subject, device, dtype, num_rows, num_tokens):
            counts = measure(engine, _known(engine, subject), num_jobs=num_jobs, num_tokens=num_tokens, seed=seed)
            share = counts.parted / counts.moved if counts.moved else 0.0
            rows.append(
                {
                    "level": level,
                    "model": subject.name,
                    "device": device if device == "cpu" else torch.cuda.get_device_name(),
                    "dtype": dtype,
                    "rows": num_rows,
                    "tokens": num_tokens,
                    "jobs": counts.jobs,
                    "moved": counts.moved,
                    "parted": counts.parted,
                    "flip_rate": round(share, 4),
                    "tokens_to_first_flip": None if counts.first_at is None else round(counts.first_at, 1),
                }
            )
            del engine  # the next one wants its memory
            record.say(f"{level}: {counts.parted} of {counts.moved} moved jobs say something else ({share:.1%})")
    machine = record.machine()
    if device != "cpu":
        machine = record.gpu_name(torch.cuda.get_device_name())
    command = _command(device, model is not None, len(subject.adapters))
    rows = [row | {"date": f"{datetime.now(UTC):%Y-%m-%d}", "command": command} for row in rows]
    done = {tuple(row[field] for field in KEY) for row in rows}
    others = [row for row in _rows(machine, out) if tuple(row[field] for field in KEY) not in done]
    path = record.write("migration", command, others + rows, name=machine, folder=out)
    record.say(f"wrote {path}")
    is_exact = device == "cpu" and dtype == "float32"
    wrong = [row for row in rows if row["parted"] and (is_exact or row["level"] == "batch_invariant")]
    if wrong:
        raise click.ClickException(
            "moved jobs must say the same here: " + ", ".join(str(row["level"]) for row in wrong)
        )


if __name__ == "__main__":
    main()
