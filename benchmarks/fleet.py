"""The fleet under a load that rises and falls: `make bench-fleet`. The whole service, as `medley up` starts it, one
worker a GPU, hundreds of adapters of several tenants, submitted and read through the client.

First one worker alone is kept busy, the others held asleep as an operator holds them: its tokens/s. Then jobs arrive
at a low rate, at a high one, at a low one again; the dispatcher wakes and drains as it sees fit. Last all workers are
kept busy. Every job is to succeed once with all of its tokens; the database is recounted at the end. On a machine of
one GPU, or of none, fewer or smaller workers show the same (`--workers-per-gpu`, `--device cpu`).
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from sqlalchemy import create_engine, text

from benchmarks import record
from benchmarks.fleet_files import make_files
from benchmarks.fleet_load import Tenant
from benchmarks.fleet_phases import Bench, run_phases, wait_for
from benchmarks.fleet_plot import draw
from benchmarks.fleet_shapes import SETTINGS, Setting
from benchmarks.fleet_watch import Watch
from benchmarks.recount import faults
from medley.client import Client
from medley.db.connections import transaction
from medley.local.gpus import visible_gpus
from medley.local.stack import LocalStack

# Of a GPU that workers share: the rest is for what each holds beside what it asks for.
SHARED_PART = 0.95
WARM_S = 600.0  # for engines to be loaded and to sleep; kernels may have to be built


def _num_warm(stack: LocalStack) -> int:
    """Workers whose engine was loaded and sleeps now, by the log. Raises ClickException where one cannot sleep."""
    log = stack.log_path.read_text()
    if "engine.sleepless" in log or "engine.died" in log:
        raise click.ClickException(f"an engine did not come to sleep:\n{log[-4000:]}")
    return len({line.split("|")[0] for line in log.splitlines() if " engine.asleep " in line})


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
            environ |= {"MEDLEY_DTYPE": "bfloat16", "MEDLEY_SLEEP": "warm", "CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        if self.gpus and self.workers_per_gpu > 1:
            environ["MEDLEY_GPU_SHARE"] = f"{SHARED_PART / self.workers_per_gpu:.3f}"
        return environ


def find_machine(device: str, gpus: int | None, workers_per_gpu: int) -> Machine:
    """Raises BadParameter where there are fewer GPUs than are asked for."""
    if device != "cuda":
        return Machine(device, [], (gpus or 2) * workers_per_gpu, workers_per_gpu)
    found = visible_gpus(os.environ)
    if len(found) < (gpus or 1):
        raise click.BadParameter(f"got {gpus or 1}, CUDA's driver shows {len(found)}", param_hint="--gpus")
    used = found[:gpus]
    return Machine(device, list(used), len(used) * workers_per_gpu, workers_per_gpu)


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
            wait_for("engines that sleep", WARM_S, lambda: _num_warm(stack) == machine.num_workers)
        record.say(f"ready after {time.perf_counter() - started:.1f} s")
        bench = Bench(setting, machine.num_workers, tenants, watch)
        figures: dict[str, Any] = {}
        unshown: list[str] = []
        try:
            is_shared = machine.workers_per_gpu > 1 or not machine.gpus
            run_phases(bench, figures, unshown, trace_s, window_s, is_shared=is_shared)
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


def _command() -> str:
    """What makes the figure again; the folders are not part of it."""
    arguments = sys.argv[1:]
    for option in ("--out", "--scratch", "--data-dir"):
        if option in arguments:
            at = arguments.index(option)
            del arguments[at : at + 2]
    return shlex.join(["python", "-m", "benchmarks.fleet", *arguments])


if __name__ == "__main__":
    main()
