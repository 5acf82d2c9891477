"""`medley demo`: the main job, whole. Two tenants upload their adapters and sweep them through the real service.

Everything here goes through `medley.Client`, but for two things: `LocalStack` is `medley up`, and the last figure
runs the same jobs once more inside one engine, mixed and adapter after adapter.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.table import Table

from medley.cli.progress import bar, follow
from medley.cli.service import err, out
from medley.client import Client, Sweep
from medley.client.files import write_jsonl, write_parquet
from medley.client.types import SweepReport
from medley.demo.skills import MAX_ANSWER_TOKENS, SKILLS, TENANTS, Skill, tenant_of
from medley.local.stack import LocalStack

ASSETS = Path(__file__).resolve().parents[1] / "demo" / "assets"


@click.command()
@click.option("--prompts", default=16, show_default=True, help="Held-out prompts a skill.")
@click.option("--workers", default=1, show_default=True, help="Workers (one engine each).")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Keep the service's state here, and resume from it.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo-results"), show_default=True)
def demo(prompts: int, workers: int, data_dir: Path | None, output: Path) -> None:
    """Run a bulk evaluation over the demo's adapters: servers, uploads, a sweep for each tenant, report."""
    with tempfile.TemporaryDirectory(prefix="medley-demo-") as scratch:
        with LocalStack(data_dir or Path(scratch), model=ASSETS / "model", workers=workers) as stack:
            click.echo(f"service: {stack.url} with {workers} worker(s), real PostgreSQL and Redis below it", err=True)
            clients = {tenant: Client(stack.url, stack.add_tenant(tenant)) for tenant in TENANTS}
            for tenant, client in clients.items():
                _upload(client, tenant)
            sweeps = [_sweep(client, tenant, prompts) for tenant, client in clients.items()]
            results = follow("jobs", *sweeps)
            reports = [sweep.report() for sweep in sweeps]
            stats = [worker.stats for worker in clients[TENANTS[0]].workers() if worker.stats]
            for client in clients.values():
                client.close()
        output.mkdir(parents=True, exist_ok=True)
        write_jsonl(output / "results.jsonl", chain(*results))
        write_parquet(output / "results.parquet", chain(*results))
        _show_report(reports)
        engine = {key: sum(s[key] for s in stats) for key in stats[0]}
        _show_engine(engine)
        click.echo(f"results: {output / 'results.jsonl'} and {output / 'results.parquet'}")
        speedup = _compare(Path(scratch), prompts)
    _summarise(reports, engine, speedup)


def _upload(client: Client, tenant: str) -> None:
    mine = [skill for skill in SKILLS if tenant_of(skill) == tenant]
    with tempfile.TemporaryDirectory() as folder, bar(f"{tenant}: adapters", len(mine)) as show:
        for skill in mine:
            (Path(folder) / skill.name).symlink_to(ASSETS / "adapters" / skill.name, target_is_directory=True)
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
        table.add_row(
            skill.name,
            skill.description,
            f"{c.base_correct}/{c.base_scored}",
            f"{c.correct}/{c.scored}",
            interval,
        )
    out.print(table)


def _show_engine(engine: dict[str, Any]) -> None:
    tokens, seconds = engine["prompt_tokens"] + engine["generated_tokens"], engine["step_s"]
    click.echo(
        f"engine: {engine['steps']:.0f} steps in {seconds:.1f} s, {tokens:.0f} tokens ({tokens / seconds:,.0f}/s),"
        f" {engine['rows'] / engine['steps']:.1f} rows of {engine['adapters'] / engine['steps']:.1f} adapters a step,"
        f" {engine['adapter_loads']:.0f} adapter loads in {engine['adapter_load_s']:.1f} s,"
        f" {engine['adapter_evictions']:.0f} evictions, {engine['preemptions']:.0f} preemptions"
    )


def _compare(scratch: Path, num_prompts: int) -> float:
    """The same adapter jobs in one engine, mixed and adapter after adapter: the ratio of the times inside it."""
    jobs = scratch / "jobs.jsonl"
    with err.status("the same jobs once more: mixed, and adapter after adapter"), jobs.open("wb") as file:
        for skill in SKILLS:
            for prompt, _ in skill.held_out(num_prompts):
                folder = str(ASSETS / "adapters" / skill.name)
                row = {"prompt": prompt, "adapter_dir": folder, "max_tokens": MAX_ANSWER_TOKENS}
                file.write(msgspec.json.encode(row) + b"\n")
        file.flush()
        command = [sys.executable, "-m", "medley_worker.compare", "--model", str(ASSETS / "model"), "--jobs", str(jobs)]
        answer = subprocess.run(command, check=True, capture_output=True).stdout
    figures: dict[str, float] = msgspec.json.decode(answer)
    click.echo(
        f"the same jobs in one engine: {figures['mixed_s']:.2f} s mixed, {figures['sequential_s']:.2f} s adapter after"
        " adapter"
    )
    return figures["speedup"]


def _summarise(reports: Sequence[SweepReport], engine: dict[str, Any], speedup: float) -> None:
    columns = [column for report in reports for column in report.adapters]
    counts = [report.sweep.counts for report in reports]
    base = sum(c.base_correct for c in columns) / sum(c.base_scored for c in columns)
    own = sum(c.correct for c in columns) / sum(c.scored for c in columns)
    click.echo(
        f"demo: adapters={len(columns)} jobs={sum(c.total for c in counts)} failed={sum(c.failed for c in counts)}"
        f" accuracy_base={base:.3f} accuracy_own={own:.3f}"
        f" adapters_per_step={engine['adapters'] / engine['steps']:.1f}"
        f" rows_per_step={engine['rows'] / engine['steps']:.1f} speedup={speedup:.2f}"
    )
