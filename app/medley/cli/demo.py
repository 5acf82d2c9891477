"""`medley demo`: the main job, whole. Two tenants upload their adapters and sweep them through the real service.

Everything here goes through `medley.Client`, but for two things: `LocalStack` is `medley up`, and the last figure
runs the same jobs once more inside one engine, mixed and adapter after adapter.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

import click
import msgspec
from rich.table import Table

from medley.cli.progress import bar, follow
from medley.cli.service import err, out
from medley.client import Client, Sweep
from medley.client.files import write_jsonl, write_parquet
from medley.client.types import SweepReport
from medley.demo import ADAPTERS_DIR, MODEL_DIR
from medley.demo.skills import MAX_ANSWER_TOKENS, SKILLS, TENANTS, Skill, tenant_of
from medley.local.stack import LocalStack


@click.command()
@click.option("--prompts", default=16, show_default=True, help="Held-out prompts a skill.")
@click.option("--workers", default=1, show_default=True, help="Workers (one engine each).")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Keep the service's state here, and resume from it.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo-results"), show_default=True)
def demo(prompts: int, workers: int, data_dir: Path | None, output: Path) -> None:
    """Run a bulk evaluation over the demo's adapters: servers, uploads, a sweep for each tenant, report."""
    with tempfile.TemporaryDirectory(prefix="medley-demo-") as scratch:
        with LocalStack(data_dir or Path(scratch), model=MODEL_DIR, workers=workers) as stack:
            click.echo(f"service: {stack.url} with {workers} worker(s), real PostgreSQL and Redis below it", err=True)
            clients = {tenant: Client(stack.url, stack.add_tenant(tenant)) for tenant in TENANTS}
            for tenant, client in clients.items():
                _upload(client, tenant)
            sweeps = [_sweep(client, tenant, prompts) for tenant, client in clients.items()]
            results = follow("jobs", *sweeps)
            reports = [sweep.report() for sweep in sweeps]
            engine = _engine_totals(clients[TENANTS[0]], sum(r.sweep.usage.completion_tokens for r in reports))
            for client in clients.values():
                client.close()
        output.mkdir(parents=True, exist_ok=True)
        write_jsonl(output / "results.jsonl", chain(*results))
        write_parquet(output / "results.parquet", chain(*results))
        _show_report(reports)
        _show_engine(engine)
        click.echo(f"results: {output}/results.jsonl and {output}/results.parquet")
        speedup = _compare(Path(scratch), prompts)
    _summarise(reports, engine, speedup)


def _upload(client: Client, tenant: str) -> None:
    mine = _skills(tenant)
    with tempfile.TemporaryDirectory() as folder, bar(f"{tenant}: adapters", len(mine)) as show:
        for skill in mine:
            (Path(folder) / skill.name).symlink_to(ADAPTERS_DIR / skill.name, target_is_directory=True)
        done = count(1)
        uploads = client.adapters.add_folder(folder, on_upload=lambda _: show(next(done)))
    for upload in uploads:
        if upload.error is not None:
            raise click.ClickException(f"{upload.name} was refused: {upload.error}")


def _sweep(client: Client, tenant: str, num_prompts: int) -> Sweep:
    """Each adapter, and the base, on the prompts of the adapter's own skill: held out from its training."""
    prompts = [
        {"prompt": prompt, "expected": expected, "adapter": skill.name, "custom_id": f"{skill.name}/{i}"}
        for i, rows in enumerate(zip(*(s.held_out(num_prompts) for s in _skills(tenant)), strict=True))
        for skill, (prompt, expected) in zip(_skills(tenant), rows, strict=True)
    ]
    return client.sweep(
        f"demo-{num_prompts}", prompts, adapters=[f"{tenant}/*"], include_base=True, max_tokens=MAX_ANSWER_TOKENS
    )


def _skills(tenant: str) -> list[Skill]:
    return [skill for skill in SKILLS if tenant_of(skill) == tenant]


def _show_report(reports: Sequence[SweepReport]) -> None:
    table = Table("skill", "what it does", "base", "own adapter", "95 %", box=None, header_style="bold")
    columns = {column.adapter: column for report in reports for column in report.adapters}
    for skill in SKILLS:
        c = columns[skill.name]
        interval = f"{c.low:.0%} to {c.high:.0%}" if c.low is not None and c.high is not None else "-"
        base, own = f"{c.base_correct}/{c.base_scored}", f"{c.correct}/{c.scored}"
        table.add_row(skill.name, skill.description, base, own, interval)
    out.print(table)


def _engine_totals(client: Client, num_tokens: int) -> Counter[str]:
    """The engines' totals, once they count the tokens of every result: workers report them now and then."""
    deadline = time.monotonic() + 10
    while True:
        totals: Counter[str] = sum((Counter(worker.stats) for worker in client.workers()), Counter())
        if totals["generated_tokens"] >= num_tokens or time.monotonic() > deadline:
            return totals
        time.sleep(0.2)


def _show_engine(engine: Counter[str]) -> None:
    tokens, seconds = engine["prompt_tokens"] + engine["generated_tokens"], max(engine["step_s"], 1e-9)
    click.echo(
        f"engine: {engine['steps']:.0f} steps in {seconds:.1f} s, {tokens:.0f} tokens ({tokens / seconds:,.0f}/s),"
        f" {_per_step(engine, 'rows'):.1f} rows of {_per_step(engine, 'adapters'):.1f} adapters a step,"
        f" {engine['adapter_loads']:.0f} adapter loads in {engine['adapter_load_s']:.1f} s,"
        f" {engine['adapter_evictions']:.0f} evictions, {engine['preemptions']:.0f} preemptions"
    )


def _per_step(engine: Counter[str], what: str) -> float:
    return engine[what] / max(1, engine["steps"])  # a sweep that had finished takes no steps


def _compare(scratch: Path, num_prompts: int) -> float:
    """The same adapter jobs in one engine, adapter after adapter over mixed: the ratio of the times inside it."""
    jobs = scratch / "jobs.jsonl"
    with err.status("the same jobs once more: mixed, and adapter after adapter"), jobs.open("wb") as file:
        for skill in SKILLS:
            for prompt, _ in skill.held_out(num_prompts):
                folder = str(ADAPTERS_DIR / skill.name)
                row = {"prompt": prompt, "adapter_dir": folder, "max_tokens": MAX_ANSWER_TOKENS}
                file.write(msgspec.json.encode(row) + b"\n")
        file.flush()
        command = [sys.executable, "-m", "medley_worker.compare", "--model", str(MODEL_DIR), "--jobs", str(jobs)]
        answer = subprocess.run(command, check=True, capture_output=True).stdout
    figures: dict[str, float] = msgspec.json.decode(answer)
    click.echo("the same jobs in one engine: {mixed_s:.2f} s mixed, {sequential_s:.2f} s one by one".format(**figures))
    return figures["speedup"]


def _summarise(reports: Sequence[SweepReport], engine: Counter[str], speedup: float) -> None:
    columns = [column for report in reports for column in report.adapters]
    base = sum(c.base_correct for c in columns) / sum(c.base_scored for c in columns)
    own = sum(c.correct for c in columns) / sum(c.scored for c in columns)
    jobs, failed = (sum(getattr(r.sweep.counts, what) for r in reports) for what in ("total", "failed"))
    click.echo(
        f"demo: adapters={len(columns)} jobs={jobs} failed={failed} accuracy_base={base:.3f} accuracy_own={own:.3f}"
        f" adapters_per_step={_per_step(engine, 'adapters'):.1f}"
        f" rows_per_step={_per_step(engine, 'rows'):.1f} speedup={speedup:.2f}"
    )
