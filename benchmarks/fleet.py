"""The fleet under a load that rises and falls: `make bench-fleet`. The whole service, as `medley up` starts it, one
worker a GPU, hundreds of adapters of several tenants, submitted and read through the client.

First one worker alone is kept busy, the others held asleep as an operator holds them: its tokens/s. Then jobs arrive
at a low rate, at a high one, at a low one again; the dispatcher wakes and drains as it sees fit. Last all workers are
kept busy. Every job is to succeed once with all of its tokens; the database is recounted at the end. On a machine of
one GPU, or of none, fewer or smaller workers show the same (`--workers-per-gpu`, `--device cpu`).
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from sqlalchemy import create_engine, text

from benchmarks import record
from benchmarks.fleet_files import make_files
from benchmarks.fleet_load import Arrivals, Backlog, Ledger, Lengths, Source, Tenant
from benchmarks.fleet_plot import draw
from benchmarks.fleet_shapes import SETTINGS, Setting, rates
from benchmarks.fleet_watch import Watch
from benchmarks.recount import faults
from medley.client import Client
from medley.db.connections import transaction
from medley.db.fleet import Steer
from medley.local.gpus import VISIBLE, visible_gpus
from medley.local.stack import LocalStack

SEED = 20261122
WARM_S = 600.0  # for engines to be loaded and to sleep; kernels may have to be built
SETTLE_S = 90.0  # after the load has fallen for as long as planned: for the last to be alone awake
LOOK_S = 0.5
REPORT_S = 3.0  # by which workers have told of the steps before
SERIES_S, RATE_S = 1.0, 5.0  # between two points of a series; over which its rates are taken


@dataclass
class Bench:
    """The service as it runs, and what it is made to do."""

    setting: Setting
    num_workers: int
    tenants: list[Tenant]
    watch: Watch
    ledger: Ledger = field(default_factory=Ledger)

    def saturate(self, num_workers: int, window_s: float) -> dict[str, float]:
        """Tokens/s of so many workers with more to do than they can: of results, and by the engines' own count."""
        setting, watch = self.setting, self.watch
        ledger = Ledger()
        sources = self._sources(setting.steady, seed=SEED + num_workers)
        with Backlog(ledger, sources, self.tenants, 6 * setting.rows * num_workers):
            _wait_for("every worker to be awake", WARM_S, lambda: watch.num_active() == num_workers)
            time.sleep(setting.warm_s)
            since = watch.now
            time.sleep(window_s)
            until = watch.now
        self._add(ledger)
        counted = sum(seen.tokens(since, until) for seen in watch.workers.values())
        return {
            "workers": num_workers,
            "tok_s": round(ledger.tokens_per_s(since, until), 1),
            "engines_tok_s": round(counted / (until - since), 1),
            "rows_per_step": [round(seen.rows_per_step(since, until), 1) for seen in watch.workers.values()],
        }

    def rise_and_fall(self, capacity_jobs_s: float, seconds: float, is_shared: bool) -> dict[str, Any]:
        """Jobs by the rates of the plan, as shares of what one worker serves. What the fleet did meanwhile."""
        rate = rates(self.setting, self.num_workers, is_shared=is_shared)
        sources = self._sources(self.setting.lengths, seed=SEED)
        time.sleep(REPORT_S)
        ledger, since = Ledger(), self.watch.now
        with Arrivals(ledger, sources, self.tenants, lambda s: capacity_jobs_s * rate(s / seconds)):
            time.sleep(seconds)
            self._settle()
            until = self.watch.now
        self._add(ledger)
        awake = [(round(at - since, 2), num) for at, num in self.watch.awake(since, until)]
        wakes = sorted(self.watch.wakes)
        return {
            "gpus_awake": awake,
            "wake_s": round(wakes[len(wakes) // 2], 3) if wakes else None,
            "wakes_s": [round(wake, 3) for wake in wakes],
            "series": self._series(ledger, since, until),
        }

    def _settle(self) -> None:
        """The low load goes on until the others sleep again, for so long as that may take."""
        deadline = time.monotonic() + SETTLE_S
        while self.num_workers > 1 and self.watch.num_awake() > 1 and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        time.sleep(RATE_S)

    def _series(self, ledger: Ledger, since: float, until: float) -> list[dict[str, Any]]:
        """load_tok_s: new tokens that were asked for. rows_per_step: of each worker. Rates of the last RATE_S."""
        points = []
        for number in range(1, int((until - since) / SERIES_S) + 1):
            now = since + number * SERIES_S
            before = max(since, now - RATE_S)
            asked = sum(tokens for at, _, tokens in ledger.submitted if before <= at < now)
            seen = self.watch.workers.values()
            points.append(
                {
                    "s": round(now - since, 1),
                    "load_tok_s": round(asked / (now - before), 1),
                    "tok_s": round(sum(w.tokens(before, now) for w in seen) / (now - before), 1),
                    "queued": self.watch.num_queued(now),
                    "rows_per_step": [round(w.rows_per_step(before, now), 1) for w in seen],
                }
            )
        return points

    def _sources(self, lengths: Lengths, seed: int) -> dict[str, Source]:
        return {tenant.name: Source(tenant, lengths, seed) for tenant in self.tenants}

    def _add(self, ledger: Ledger) -> None:
        """To what the whole run has come to; each phase has a ledger of its own."""
        self.ledger.submitted += ledger.submitted
        self.ledger.results += ledger.results
        self.ledger.faults += ledger.faults
        self.ledger.num_failed += ledger.num_failed


def _num_warm(stack: LocalStack) -> int:
    """Workers whose engine was loaded and sleeps now, by the log. Raises ClickException where one cannot sleep."""
    log = stack.log_path.read_text()
    if "engine.sleepless" in log or "engine.died" in log:
        raise click.ClickException(f"an engine did not come to sleep:\n{log[-4000:]}")
    return len({line.split("|")[0] for line in log.splitlines() if " engine.asleep " in line})


def _wait_for(what: str, timeout_s: float, holds: Any) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise click.ClickException(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(0.1)


def take_in(stack: LocalStack, folders: dict[str, Path], closing: ExitStack) -> tuple[list[Tenant], dict[str, float]]:
    """A tenant a folder, with the adapters in it uploaded. Also how long that took, over how many bytes."""
    started = time.perf_counter()
    clients = {name: closing.enter_context(Client(stack.url, stack.add_tenant(name))) for name in folders}

    def upload(name: str) -> Tenant:
        uploads = clients[name].adapters.add_folder(folders[name])
        if refused := [upload for upload in uploads if upload.error is not None]:
            raise click.ClickException(f"{refused[0].name} was refused: {refused[0].error}")
        return Tenant(name, clients[name], tuple(upload.name for upload in uploads))

    with ThreadPoolExecutor(len(folders)) as pool:
        tenants = list(pool.map(upload, folders))
    num_bytes = sum(file.stat().st_size for folder in folders.values() for file in folder.glob("*/*"))
    record.say(f"took in {sum(len(t.adapters) for t in tenants)} adapters of {num_bytes / 1e9:.1f} GB")
    return tenants, {"intake_s": round(time.perf_counter() - started, 1), "intake_gb": round(num_bytes / 1e9, 2)}


@dataclass(frozen=True)
class Machine:
    """What there is to run on. gpus: [] for a CPU."""

    device: str
    gpus: Sequence[str]
    num_workers: int
    workers_per_gpu: int

    @property
    def name(self) -> str:
        """Of the result: `h200x2`, `h200`, or the machine's kind."""
        if not self.gpus:
            return record.machine()
        name = record.gpu_name(self.model)
        return name + (f"x{len(self.gpus)}" if len(self.gpus) > 1 else "")

    @property
    def model(self) -> str:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()

    def environ(self, setting: Setting) -> dict[str, str]:
        environ = {"MEDLEY_DEVICE": self.device, "MEDLEY_MAX_NUM_SEQS": str(setting.rows)}
        if self.gpus:
            environ |= {"MEDLEY_DTYPE": "bfloat16", "MEDLEY_SLEEP": "warm", VISIBLE: ",".join(self.gpus)}
        return environ


def find_machine(device: str, gpus: int | None, workers_per_gpu: int) -> Machine:
    """Raises BadParameter where there are fewer GPUs than are asked for."""
    if device != "cuda":
        return Machine(device, [], (gpus or 2) * workers_per_gpu, workers_per_gpu)
    found = visible_gpus({"MEDLEY_DEVICE": "cuda"})
    if len(found) < (gpus or 1):
        raise click.BadParameter(f"got {gpus or 1}, nvidia-smi tells of {len(found)}", param_hint="--gpus")
    used = found[:gpus]
    return Machine(device, used, len(used) * workers_per_gpu, workers_per_gpu)


@click.command()
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--shape", type=click.Choice(list(SETTINGS)), help="[default: 7b on a GPU, demo on a CPU]")
@click.option("--gpus", type=click.IntRange(1), help="How many, of a CPU workers.  [default: all, of a CPU 2]")
@click.option(
    "--workers-per-gpu", type=click.IntRange(1), default=1, show_default=True, help="More than 1: a rehearsal."
)
@click.option("--minutes", type=click.FloatRange(0.1), default=2.5, show_default=True, help="Of the rise and fall.")
@click.option("--window-s", type=click.FloatRange(1), default=25.0, show_default=True, help="Of each tokens/s.")
@click.option("--adapters", type=click.IntRange(1), help="Of all tenants together.  [default: by the shape]")
@click.option("--scratch", type=click.Path(path_type=Path), help="For model, adapters and the service's data.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Of the service.  [default: gone afterwards]")
@click.option("--out", type=click.Path(path_type=Path), default=record.RESULTS, help="Folder of the results.")
def main(
    device: str,
    shape: str | None,
    gpus: int | None,
    workers_per_gpu: int,
    minutes: float,
    window_s: float,
    adapters: int | None,
    scratch: Path | None,
    data_dir: Path | None,
    out: Path,
) -> None:
    """Run, write `<machine>-fleet.json` and its picture, and fail where the fleet did not do what it should."""
    machine = find_machine(device, gpus, workers_per_gpu)
    shape = shape or ("7b" if machine.gpus else "demo")
    setting = SETTINGS[shape]
    is_figure = shape == ("7b" if machine.gpus else "demo") and workers_per_gpu == 1
    with ExitStack() as closing:
        temporary = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="medley-fleet-")))
        places = Places(shape, (scratch or temporary) / shape, data_dir or temporary / "data")
        found = _run(machine, setting, places, adapters or setting.adapters, minutes * 60, window_s)
    document = record.heading("fleet", _command(), found.pop("notes"), name=machine.name)
    if machine.gpus:
        document["machine"] |= {"gpu": machine.model, "gpus": len(machine.gpus)}
    name = f"{machine.name}-fleet" + ("" if is_figure or (len(machine.gpus) == 1 and shape == "7b") else f"-{shape}")
    path = record.save(document | found, name, out)
    record.say(f"wrote {path}")
    if "series" in found and draw(path):
        record.say(f"drew {path.with_suffix('.png')}")
    record.say(", ".join(f"{key} {value}" for key, value in found.items() if key not in ("series", "faults")))
    if found["faults"]:
        raise click.ClickException("; ".join(found["faults"][:10]))


@dataclass(frozen=True)
class Places:
    """The shape of the model, the folder of its and the adapters' files, and the service's data directory."""

    shape: str
    files: Path
    data: Path


def _run(
    machine: Machine, setting: Setting, places: Places, num_adapters: int, trace_s: float, window_s: float
) -> dict[str, Any]:
    """All phases. Returns the figures; `faults` has all that is not as it should be."""
    shares = {name: len(range(i, num_adapters, setting.tenants)) for i, name in enumerate(setting.tenant_names)}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("SIGTERM"))
    started = time.perf_counter()
    model, folders = make_files(places.shape, places.files, shares, machine.device)
    record.say(f"made {places.files} in {time.perf_counter() - started:.1f} s")
    with ExitStack() as closing:
        stack = LocalStack(
            places.data,
            model=model,
            workers=machine.num_workers,
            environ=machine.environ(setting),
            ready_timeout_s=WARM_S,
        )
        closing.enter_context(stack)
        engine = create_engine(stack.database_url("medley_owner"))
        closing.callback(engine.dispose)
        tenants, intake = take_in(stack, folders, closing)
        watch = closing.enter_context(Watch(engine, stack.redis_url))
        if machine.gpus:
            _wait_for("engines that sleep", WARM_S, lambda: _num_warm(stack) == machine.num_workers)
        record.say(f"ready after {time.perf_counter() - started:.1f} s")
        bench = Bench(setting, machine.num_workers, tenants, watch)
        figures: dict[str, Any] = {}
        unshown: list[str] = []
        try:
            is_shared = machine.workers_per_gpu > 1 or not machine.gpus
            _phases(bench, figures, unshown, trace_s, window_s, is_shared=is_shared)
        except BaseException as error:  # what there is so far is told too
            unshown.append(f"cut off by {error!r}")
        with transaction(engine) as conn:
            differing = faults(conn)
            moved = conn.execute(text("SELECT id FROM jobs WHERE attempt > 1")).scalars().all()
    found = bench.ledger.faults + [f"{what}: {count}" for what, count in differing.items()] + unshown
    if not moved:
        found.append("no job has moved")
    notes = [] if machine.workers_per_gpu == 1 else [f"{machine.workers_per_gpu} workers share each GPU: a rehearsal"]
    return figures | {
        "migrated": len(moved),
        "migrated_with_tokens": len(set(moved) & set(watch.kept)),
        "failed": bench.ledger.num_failed,
        "jobs": bench.ledger.num_submitted,
        "results": len(bench.ledger.results),
        "shape": places.shape,
        "rows": setting.rows,
        "adapters": num_adapters,
        "tenants": setting.tenants,
        **intake,
        "faults": found,
        "notes": notes,
    }


def _phases(
    bench: Bench, figures: dict[str, Any], unshown: list[str], trace_s: float, window_s: float, *, is_shared: bool
) -> None:
    """One worker alone, the rise and fall, all workers: into `figures`. unshown: what should be seen and was not."""
    watch, num = bench.watch, bench.num_workers
    others = list(watch.workers)[1:]
    watch.steer(others, Steer.SLEEP)
    one = bench.saturate(1, window_s)
    record.say(f"one worker: {one}")
    watch.steer(others, Steer.RELEASE)
    figures |= {"one_gpu_tok_s": one["tok_s"], "steady": [one]}
    figures |= bench.rise_and_fall(one["tok_s"] / bench.setting.lengths.mean_new, trace_s, is_shared)
    counts = [count for _, count in figures["gpus_awake"]]
    record.say(f"awake: {figures['gpus_awake']}, woken in {figures['wakes_s']} s")
    if num == 1:
        return
    if (counts[0], max(counts), counts[-1]) != (1, num, 1):
        unshown.append(f"workers awake: {counts}")
    every = bench.saturate(num, window_s)
    record.say(f"all workers: {every}")
    word = {2: "two"}.get(num, str(num))
    figures |= {f"{word}_gpu_tok_s": every["tok_s"], "ratio": round(every["tok_s"] / one["tok_s"], 3)}
    figures["steady"].append(every)


def _command() -> str:
    """What makes the figure again; the folders are not part of it."""
    arguments = sys.argv[1:]
    for option in ("--out", "--scratch"):
        if option in arguments:
            at = arguments.index(option)
            del arguments[at : at + 2]
    return shlex.join(["python", "-m", "benchmarks.fleet", *arguments])


if __name__ == "__main__":
    main()
