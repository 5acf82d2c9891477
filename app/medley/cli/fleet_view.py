"""The fleet as a table and as JSON: from workers' rows to cells. Knows no database and no terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Row

from medley.cli.live import Part, View
from medley.spec.ids import WORKER, public_id

MIN_DIGITS = 8
HEADERS = (
    "worker",
    "host",
    "pid",
    "state",
    "lease",
    "rows",
    "jobs",
    "adapters",
    "tok/s",
    "step ms",
    "GPU GB",
    "since",
    "version",
)
_NUMBERS = frozenset({2, 4, 5, 6, 7, 8, 9, 10, 11})


def fleet_view(rows: Sequence[Row[Any]], queues: Mapping[str, int], pool: str | None) -> View:
    """One part a pool, in the order of the rows."""
    pools = dict.fromkeys([*(row.pool for row in rows), *queues, *([pool] if pool else [])])
    shown = digits_shown([row.id for row in rows])
    parts = []
    for name in pools:
        mine = [row for row in rows if row.pool == name]
        parts.append(
            Part(_summary(name, mine, queues.get(name, 0)), HEADERS, [_cells(r, shown) for r in mine], _NUMBERS)
        )
    if not parts:
        parts.append(Part("no worker lives and no job waits", HEADERS, []))
    return View(parts, [_value(row) for row in rows])


def digits_shown(workers: Sequence[UUID]) -> int:
    """How many digits of an id tell these workers apart; they begin alike, as they begin with the time."""
    for num in range(MIN_DIGITS, 32):
        if len({worker.hex[:num] for worker in workers}) == len(workers):
            return num
    return 32


def state_of(row: Row[Any]) -> str:
    """As `active`, `active > asleep` where it is told otherwise, with who holds it."""
    told = "" if row.desired_state in (row.state, "gone") else f" > {row.desired_state}"
    if row.state == "waking" and row.desired_state == "active":
        told = ""  # on its way
    if row.held_state is not None and not told and row.held_state not in (row.state, row.desired_state):
        told = f" > {row.held_state}"  # once its jobs have ended
    held = "" if row.held_state is None else f" (held by {row.held_by})"
    silent = "" if row.lease_left_s > 0 else " (lapsed)"
    return f"{row.state}{told}{held}{silent}"


def span(seconds: float) -> str:
    """As `8s`, `5m`, `3h` or `2d`."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def number(value: Any, digits: int = 0) -> str:
    """With commas; `-` where nothing was said."""
    return "-" if value is None else f"{value:,.{digits}f}"


def _summary(pool: str, rows: Sequence[Row[Any]], num_queued: int) -> str:
    states = [row.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    active = [row for row in rows if row.state in ("active", "draining")]
    used = sum(row.stats.get("num_running") or 0 for row in active)
    room = sum(row.max_num_seqs for row in active)
    tokens = sum(row.stats.get("tokens_per_s") or 0 for row in active)
    workers = f"{len(rows)} worker{'' if len(rows) == 1 else 's'}" + (f" ({counts})" if counts else "")
    return f"pool {pool}: {workers}, {num_queued:,} jobs wait, {used:,} of {room:,} rows run, {tokens:,.0f} tok/s"


def _cells(row: Row[Any], digits: int) -> tuple[str, ...]:
    stats = row.stats
    is_loaded = row.state in ("active", "draining")
    gb, total_gb = ((stats.get(name) or 0) / 1e9 for name in ("device_bytes", "device_total_bytes"))
    return (
        row.id.hex[:digits],
        row.host,
        str(row.pid),
        state_of(row),
        f"{row.lease_left_s:.1f}s",
        f"{stats.get('num_running') or 0 if is_loaded else 0}/{row.max_num_seqs}",
        number(row.num_leased),
        number(len(row.resident)),
        number(stats.get("tokens_per_s") if is_loaded else None),
        number(stats.get("step_ms") if is_loaded else None, 1),
        f"{gb:.1f}/{total_gb:.0f}" if total_gb else "-",
        span(row.unchanged_s),
        row.version or "-",
    )


def _value(row: Row[Any]) -> dict[str, object]:
    stats = row.stats
    return {
        "id": public_id(WORKER, row.id),
        "pool": row.pool,
        "host": row.host,
        "pid": row.pid,
        "version": row.version,
        "state": row.state,
        "desired_state": row.desired_state,
        "held_state": row.held_state,
        "held_by": row.held_by,
        "held_at": row.held_at,
        "lease_left_s": round(row.lease_left_s, 2),
        "unchanged_s": round(row.unchanged_s, 2),
        "up_s": round(row.up_s, 2),
        "max_num_seqs": row.max_num_seqs,
        "num_running": stats.get("num_running"),
        "num_waiting": stats.get("num_waiting"),
        "num_leased": row.num_leased,
        "num_resident": len(row.resident),
        "tokens_per_s": stats.get("tokens_per_s"),
        "step_ms": stats.get("step_ms"),
        "device_bytes": stats.get("device_bytes"),
        "device_total_bytes": stats.get("device_total_bytes"),
    }
