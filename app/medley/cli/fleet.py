"""`medley fleet [list]|drain|sleep|wake|release|log`: the workers as their operator sees and steers them."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import click
from sqlalchemy import Connection, Engine, Row

from medley.cli.fleet_view import digits_shown, fleet_view, state_of
from medley.cli.live import Part, View, show, watch
from medley.cli.operating import data_dir_option, operator_redis_url, owner_engine
from medley.config import DEFAULT_DATA_DIR
from medley.db import fleet as fleet_db
from medley.db.fleet import Steer
from medley.rings import Ringer
from medley.spec.ids import WORKER

F = TypeVar("F", bound=Callable[..., Any])

pool_option: Callable[[F], F] = click.option("--pool", help="Of this pool alone.")
json_option: Callable[[F], F] = click.option("--json", "as_json", is_flag=True, help="JSON, one value a line.")
_watch_option: Callable[[F], F] = click.option("--watch", "-w", "is_watched", is_flag=True, help="Until Ctrl-C.")
_every_option: Callable[[F], F] = click.option(
    "--every", "every_s", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds, of --watch."
)


@click.group(invoke_without_command=True)
@pool_option
@_watch_option
@_every_option
@json_option
@data_dir_option
@click.pass_context
def fleet(ctx: click.Context, /, pool: str | None, **options: Any) -> None:
    """Show the workers, and steer them by hand (as medley_owner).

    What is said by hand holds against the dispatcher until `medley fleet release`, or until the worker's process ends.
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_all, pool=pool, **options)
    elif pool is not None or options["is_watched"] or options["as_json"] or options["data_dir"] != DEFAULT_DATA_DIR:
        raise click.UsageError(f"options come after the command: medley fleet {ctx.invoked_subcommand} --...")


@fleet.command(name="list")
@pool_option
@_watch_option
@_every_option
@json_option
@data_dir_option
def list_all(pool: str | None, is_watched: bool, every_s: float, as_json: bool, data_dir: Path) -> None:
    """List the living workers: what they are told and do, what they hold, how fast they are.

    `state > desired` is on its way; lease: how long the worker may still be silent; rows: running of all; jobs: held,
    rows and backlog; adapters: in its memory; since: of the state.
    """
    with owner_engine(data_dir) as engine:

        def look() -> View:
            with engine.begin() as conn:
                return fleet_view(fleet_db.read_fleet(conn, pool), fleet_db.read_queues(conn, pool), pool)

        if is_watched:
            watch(look, as_json=as_json, every_s=every_s)
        else:
            show(look, as_json=as_json)


@fleet.command()
@pool_option
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="The newest so many.")
@json_option
@data_dir_option
def log(pool: str | None, limit: int, as_json: bool, data_dir: Path) -> None:
    """Show who steered which worker, newest first."""
    with owner_engine(data_dir) as engine, engine.begin() as conn:
        rows = fleet_db.read_log(conn, pool, limit)
    values = [
        {"at": r.at, "by": r.operator, "action": r.action, "worker": f"{WORKER}_{r.worker_id.hex}"} | dict(r.details)
        for r in rows
    ]
    cells = [
        (r.at.isoformat(timespec="seconds"), r.operator, r.action, r.worker_id.hex, r.details.get("host", ""))
        for r in rows
    ]
    part = Part("what was said to workers by hand", ("at", "by", "action", "worker", "host"), cells)
    show(lambda: View([part], values), as_json=as_json)


def _steering(how: Steer, help_text: str) -> click.Command:
    @fleet.command(name=how.value, help=help_text)
    @click.argument("workers", nargs=-1, metavar="WORKER...")
    @click.option("--all", "is_all", is_flag=True, help="Every worker (with --pool: of that pool).")
    @pool_option
    @json_option
    @data_dir_option
    def command(workers: Sequence[str], is_all: bool, pool: str | None, as_json: bool, data_dir: Path) -> None:
        if is_all == bool(workers):
            raise click.UsageError("name workers, or give --all")
        with owner_engine(data_dir) as engine:
            steered = _steer(engine, how, workers, pool)
            _tell(operator_redis_url(data_dir), [row.id for row in steered])
            _show_steered(engine, steered, as_json)

    return command


_steering(Steer.DRAIN, "Give a worker's jobs to the others now, with what they have generated, and let it sleep.")
_steering(Steer.SLEEP, "Give a worker no more jobs, and let it sleep once those that it has are done.")
_steering(Steer.WAKE, "Wake a worker, and keep it awake.")
_steering(Steer.RELEASE, "Leave a worker to the dispatcher again.")


def find_workers(rows: Sequence[Row[Any]], names: Sequence[str]) -> list[UUID]:
    """The workers that ids, or their beginnings, name. Raises BadParameter with all that is wrong."""
    found: dict[UUID, None] = {}
    faults = []
    for name in names:
        digits = name.lower().removeprefix(f"{WORKER}_").replace("-", "")
        matches = [row.id for row in rows if digits and row.id.hex.startswith(digits)]
        if len(matches) == 1:
            found[matches[0]] = None
        elif not matches:
            faults.append(f"no living worker's id begins with {name!r}; `medley fleet` shows them")
        else:
            num = digits_shown(matches)
            faults.append(f"{name!r} begins {len(matches)} ids: " + ", ".join(worker.hex[:num] for worker in matches))
    if faults:
        raise click.BadParameter("; ".join(faults), param_hint="WORKER")
    return list(found)


def _steer(engine: Engine, how: Steer, names: Sequence[str], pool: str | None) -> list[Row[Any]]:
    """All in one transaction, or none."""
    with engine.begin() as conn:
        rows = fleet_db.read_fleet(conn, pool)
        workers = find_workers(rows, names) if names else [row.id for row in rows if row.lease_left_s > 0]
        if not workers:
            raise click.ClickException("no worker lives" + (f" in the pool {pool}" if pool else ""))
        return [_held(conn, worker, how) for worker in workers]


def _held(conn: Connection, worker: UUID, how: Steer) -> Row[Any]:
    row = fleet_db.steer(conn, worker, how, getpass.getuser())
    if row is None:
        raise click.ClickException(f"the lease of worker {worker.hex} has lapsed; nothing was done")
    return row


def _tell(redis_url: str | None, workers: Sequence[UUID]) -> None:
    """Rings; without Redis the workers see their rows with their next renewals."""
    if redis_url is None:
        return
    ringer = Ringer(redis_url)
    for worker in workers:
        ringer.tell_worker(worker)
    ringer.close()


def _show_steered(engine: Engine, steered: Sequence[Row[Any]], as_json: bool) -> None:
    ids = {row.id for row in steered}
    with engine.begin() as conn:
        living = fleet_db.read_fleet(conn, None)
    rows = [row for row in living if row.id in ids]
    if as_json:
        show(lambda: fleet_view(rows, {}, None), as_json=True)
        return
    digits = digits_shown([row.id for row in living])
    for row in rows:
        click.echo(f"{row.id.hex[:digits]}\t{state_of(row)}")
