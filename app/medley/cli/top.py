"""`medley top`: what runs on the active workers, by tenant and adapter, as it changes.

Workers say it with each renewal of their lease; while somebody looks, each look asks them to renew soon.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import click
from sqlalchemy import Connection, Row

from medley.cli.fleet import find_workers, json_option, pool_option
from medley.cli.fleet_view import digits_shown, number, state_of
from medley.cli.live import Part, View, show, watch
from medley.cli.operating import data_dir_option, operator_redis_url, owner_engine
from medley.db import fleet as fleet_db
from medley.rings import Ringer
from medley.spec.ids import REVISION, WORKER, public_id

HEADERS = ("tenant", "adapter", "decoding", "prefilling", "waiting")
MAX_ASKED = 64  # workers that a look asks to renew; more would be seen a renewal later
ACTIVE = ("active", "draining")
# What --json says of each worker's stats.
STATS = ("num_running", "num_waiting", "tokens_per_s", "steps_per_s", "step_ms", "rows_per_step", "adapters_per_step")
STATS_OF_MEMORY = ("pages_used", "num_pages", "tiles_used", "num_tiles")


@click.command()
@click.argument("workers", nargs=-1, metavar="[WORKER]...")
@pool_option
@click.option("--once", is_flag=True, help="One look, as it is where the output is no terminal.")
@click.option("--watch", "-w", "is_watched", is_flag=True, help="Look again and again there too.")
@click.option(
    "--every", "every_s", type=click.FloatRange(0.5, 3600), default=1.0, show_default=True, help="Seconds of a look."
)
@json_option
@data_dir_option
def top(
    workers: Sequence[str],
    pool: str | None,
    once: bool,
    is_watched: bool,
    every_s: float,
    as_json: bool,
    data_dir: Path,
) -> None:
    """Show the running batch of each active worker (or of WORKERs) by tenant and adapter, until Ctrl-C.

    decoding: rows that grow by a token a step; prefilling: rows whose prompts are being computed; waiting: jobs that
    the worker holds behind them. Pages are the KV cache's, tiles the adapters' memory.
    """
    redis_url = operator_redis_url(data_dir)
    ringer = None if redis_url is None else Ringer(redis_url)
    with ExitStack() as stack:
        engine = stack.enter_context(owner_engine(data_dir))
        if ringer is not None:
            stack.callback(ringer.close)

        def look() -> View:
            with engine.begin() as conn:
                rows = fleet_db.read_fleet(conn, pool)
                chosen = set(find_workers(rows, workers)) if workers else None
                shown = [row for row in rows if (row.state in ACTIVE if chosen is None else row.id in chosen)]
                view = _view(conn, rows, shown)
            if ringer is not None:
                for row in shown[:MAX_ASKED]:
                    ringer.tell_worker(row.id)
            return view

        if is_watched or (sys.stdout.isatty() and not as_json and not once):
            watch(look, as_json=as_json, every_s=every_s)
        else:
            show(look, as_json=as_json)


def _view(conn: Connection, living: Sequence[Row[Any]], shown: Sequence[Row[Any]]) -> View:
    said = {row.worker_id: row for row in fleet_db.read_batches(conn, [row.id for row in shown])}
    shares = [share for row in said.values() for share in row.batch.get("shares", ())]
    tenants, adapters = fleet_db.read_names(
        conn, {UUID(hex=share[0]) for share in shares}, {UUID(hex=share[1]) for share in shares if share[1]}
    )
    digits = digits_shown([row.id for row in living])
    parts, values = [], []
    for row in shown:
        batch = said[row.id].batch if row.id in said else {}
        named = [_named(share, tenants, adapters) for share in batch.get("shares", ())]
        others = batch.get("others") or [0, 0, 0, 0]
        parts.append(Part(_summary(row, digits, said.get(row.id)), HEADERS, _rows(named, others), frozenset({2, 3, 4})))
        values.append(_value(row, said.get(row.id), named, others))
    if not parts:
        parts.append(Part(f"no worker is active ({len(living)} live)", HEADERS, []))
    return View(parts, values)


def _named(share: Sequence[Any], tenants: dict[UUID, str], adapters: dict[UUID, str]) -> dict[str, Any]:
    tenant = UUID(hex=share[0])
    name = tenants.get(tenant, tenant.hex)
    adapter = None
    if share[1] is not None:
        revision = UUID(hex=share[1])
        # A tenant's own adapter by its name, another's with its owner's.
        adapter = adapters.get(revision, public_id(REVISION, revision)).removeprefix(f"{name}/")
    return {
        "tenant": name,
        "adapter": adapter,
        "decoding": share[2],
        "prefilling": share[3],
        "waiting": share[4],
    }


def _rows(named: Sequence[dict[str, Any]], others: Sequence[int]) -> list[tuple[str, ...]]:
    rows = [
        (share["tenant"], share["adapter"] or "(base)", *(number(share[key]) for key in HEADERS[2:])) for share in named
    ]
    if others[3]:
        rows.append((f"{others[3]} more", "", *(number(count) for count in others[:3])))
    return rows


def _summary(row: Row[Any], digits: int, said: Row[Any] | None) -> str:
    stats: dict[str, Any] = row.stats

    def of(used: str, total: str) -> str:
        return f"{number(stats.get(used) or 0)}/{number(stats.get(total) or 0)}"

    facts = [
        f"rows {number(stats.get('num_running') or 0)}/{row.max_num_seqs}",
        f"{number(stats.get('tokens_per_s'))} tok/s",
        f"step {number(stats.get('step_ms'), 1)} ms",
        f"{number(stats.get('rows_per_step'), 1)} rows and {number(stats.get('adapters_per_step'), 1)} adapters a step",
        f"pages {of('pages_used', 'num_pages')}",
        f"tiles {of('tiles_used', 'num_tiles')}",
    ]
    if said is not None and said.age_s >= 5:
        facts.append(f"said {said.age_s:.0f} s ago")
    return f"{row.id.hex[:digits]} {row.host} {state_of(row)}: " + ", ".join(facts)


def _value(
    row: Row[Any], said: Row[Any] | None, named: Sequence[dict[str, Any]], others: Sequence[int]
) -> dict[str, object]:
    return {
        "id": public_id(WORKER, row.id),
        "pool": row.pool,
        "host": row.host,
        "state": row.state,
        "max_num_seqs": row.max_num_seqs,
        **{name: row.stats.get(name) for name in (*STATS, *STATS_OF_MEMORY)},
        "age_s": None if said is None else round(said.age_s, 2),
        "batch": list(named),
        "others": dict(zip((*HEADERS[2:], "shares"), others, strict=True)),
    }
