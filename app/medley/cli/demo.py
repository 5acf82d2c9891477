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
from rich.console import Console
from rich.table import Table

from medley.cli.service import err, out
from medley.client import Client, Result, Sweep
from medley.client.files import write_jsonl, write_parquet
from medley.client.progress import bar
from medley.client.types import SweepReport
from medley.demo import ADAPTERS_DIR, MODEL_DIR
from medley.demo.skills import MAX_ANSWER_TOKENS, SKILLS, TENANTS, tenant_of
from medley.local.stack import LocalStack, StackFailed

ROWS = "128"  # a step: on small cores a step costs little more for more rows
OWNED = {tenant: [skill for skill in SKILLS if tenant_of(skill) == tenant] for tenant in TENANTS}


@click.command()
@click.option("--prompts", default=16, show_default=True, help="Held-out prompts a skill.")
@click.option("--workers", default=1, show_default=True, help="Workers (one engine each).")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Keep the service's state here, and resume from it.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo-results"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Only the figures, as one JSON object.")
def demo(prompts: int, workers: int, data_dir: Path | None, output: Path, as_json: bool) -> None:
    """Run a bulk evaluation over the demo's adapters: servers, uploads, a sweep for each tenant, report."""
    try:
        _run(prompts, workers, data_dir, output, as_json)
    except StackFailed as error:
        raise click.ClickException(str(error)) from error


def _run(prompts: int, workers: int, data_dir: Path | None, output: Path, as_json: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="medley-demo-") as scratch:
        environ = {"MEDLEY_MAX_NUM_SEQS": ROWS}
        with LocalStack(data_dir or Path(scratch), model=MODEL_DIR, workers=workers, environ=environ) as stack:
            click.echo(f"service: {stack.url} with {workers} worker(s), real PostgreSQL and Redis below it", err=True)
            clients = {tenant: Client(stack.url, stack.add_tenant(tenant)) for tenant in TENANTS}
            for tenant, client in clients.items():
                _upload(client, tenant)
            sweeps = [_sweep(client, tenant, prompts) for tenant, client in clients.items()]
            results = _follow(sweeps)
            reports = [sweep.report() for sweep in sweeps]
            engine = _engine_totals(clients[TENANTS[0]], sum(r.sweep.usage.completion_tokens for r in reports))
            for client in clients.values():
                client.close()
        output.mkdir(parents=True, exist_ok=True)
        write_jsonl(output / "results.jsonl", chain(*results))
        write_parquet(output / "results.parquet", chain(*results))
        _show_report(err if as_json else out, reports)
        click.echo(_describe(engine), err=as_json)
        click.echo(f"results: {output}/results.jsonl and {output}/results.parquet", err=as_json)
        times = _compare(Path(scratch), prompts)
        click.echo("one engine: {mixed_s:.2f} s mixed, {sequential_s:.2f} s one by one".format(**times), err=as_json)
    figures = _figures(reports, engine, times["speedup"])
    click.echo(msgspec.json.encode(figures) if as_json else "demo: " + " ".join(f"{k}={v}" for k, v in figures.items()))


def _follow(sweeps: Sequence[Sweep]) -> list[list[Result]]:
    """Waits for the sweeps together under one bar. Returns the results of each, in the order of their ends."""
    found: list[list[Result]] = [[] for _ in sweeps]
    after = [0] * len(sweeps)
    running = list(range(len(sweeps)))
    with bar("jobs", sum(sweep.status.counts.total for sweep in sweeps)) as show:
        while running:
            for i in tuple(running):
                page = sweeps[i].page(after=after[i], wait=1.0 / len(running))
                found[i] += page.results
                after[i] = page.next
                if page.finished:
                    running.remove(i)
                show(sum(map(len, found)))
    return found


def _upload(client: Client, tenant: str) -> None:
    mine = OWNED[tenant]
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
        for skill in OWNED[tenant]
        for i, (prompt, expected) in enumerate(skill.held_out(num_prompts))
    ]
    return client.sweep(
        f"demo-{num_prompts}", prompts, adapters=[f"{tenant}/*"], include_base=True, max_tokens=MAX_ANSWER_TOKENS
    )


def _show_report(console: Console, reports: Sequence[SweepReport]) -> None:
    table = Table("skill", "what it does", "base", "own adapter", "95 %", box=None, header_style="bold")
    columns = {column.adapter: column for report in reports for column in report.adapters}
    for skill in SKILLS:
        c = columns[skill.name]
        interval = f"{c.low:.0%} to {c.high:.0%}" if c.low is not None and c.high is not None else "-"
        shares = (f"{c.base_correct}/{c.base_scored}", f"{c.correct}/{c.scored}")
        table.add_row(skill.name, skill.description, *shares, interval)
    console.print(table)


def _engine_totals(client: Client, num_tokens: int) -> Counter[str]:
    """The engines' totals, once they count the tokens of every result: workers report them now and then."""
    deadline, totals = time.monotonic() + 10, Counter[str]()
    while totals["generated_tokens"] < num_tokens and time.monotonic() < deadline:
        time.sleep(0.2)
        totals = sum((Counter(worker.stats) for worker in client.workers()), Counter[str]())
    return totals


def _describe(engine: Counter[str]) -> str:
    steps = max(1, engine["steps"])  # a sweep that had finished takes none
    tokens, seconds = engine["prompt_tokens"] + engine["generated_tokens"], max(engine["step_s"], 1e-9)
    return (
        f"engine: {engine['steps']} steps in {seconds:.1f} s, {tokens:.0f} tokens ({tokens / seconds:,.0f}/s),"
        f" {engine['rows'] / steps:.1f} rows of {engine['adapters'] / steps:.1f} adapters a step,"
        f" {engine['adapter_loads']:.0f} adapter loads in {engine['adapter_load_s']:.1f} s,"
        f" {engine['adapter_evictions']:.0f} evictions, {engine['preemptions']:.0f} preemptions"
    )


def _compare(scratch: Path, num_prompts: int) -> dict[str, float]:
    """The same adapter jobs in one engine, adapter after adapter over mixed, timed inside it."""
    jobs = scratch / "jobs.jsonl"
    rows = [
        {"prompt": prompt, "adapter_dir": str(ADAPTERS_DIR / skill.name), "max_tokens": MAX_ANSWER_TOKENS}
        for skill in SKILLS
        for prompt, _ in skill.held_out(num_prompts)
    ]
    jobs.write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
    command = [sys.executable, "-m", "medley_worker.compare", "--model", str(MODEL_DIR), "--jobs", str(jobs)]
    with err.status("the same jobs once more: mixed, and adapter after adapter"):
        answer = subprocess.run([*command, "--max-num-seqs", ROWS], check=True, capture_output=True).stdout
    return msgspec.json.decode(answer, type=dict[str, float])


def _figures(reports: Sequence[SweepReport], engine: Counter[str], speedup: float) -> dict[str, float]:
    columns = [column for report in reports for column in report.adapters]
    return {
        "adapters": len(columns),
        "jobs": sum(report.sweep.counts.total for report in reports),
        "failed": sum(report.sweep.counts.failed for report in reports),
        "accuracy_base": round(sum(c.base_correct for c in columns) / sum(c.base_scored for c in columns), 3),
        "accuracy_own": round(sum(c.correct for c in columns) / sum(c.scored for c in columns), 3),
        "adapters_per_step": round(engine["adapters"] / max(1, engine["steps"]), 1),
        "rows_per_step": round(engine["rows"] / max(1, engine["steps"]), 1),
        "speedup": round(speedup, 2),
    }
