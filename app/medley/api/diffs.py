"""/v1/sweeps/{id or name}/diff: columns of two sweeps, or of one, compared over the prompts that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection

from medley.api.auth import Caller, reads
from medley.api.decoding import Query
from medley.api.errors import Conflict, FaultList, InvalidRequest
from medley.api.job_bodies import shown_value
from medley.api.shapes import answer
from medley.api.sweeps import find
from medley.db.sweep_diffs import read_pairs
from medley.db.sweeps import read_columns
from medley.spec.errors import Fault
from medley.spec.ids import SWEEP, public_id
from medley.spec.paired import NUM_RESAMPLES, SEED, DiffColumn, PromptPairs, adjust, compare

BASE = "(base)"  # how the base is named here: no adapter can be

router = APIRouter(prefix="/v1/sweeps")


class Diff(msgspec.Struct):
    """`seed` and `num_resamples` are the bootstrap's."""

    sweep: str
    with_sweep: str
    seed: int
    num_resamples: int
    columns: list[DiffColumn]


@dataclass(frozen=True)
class _Asked:
    sweep: str
    with_sweep: str | None
    adapter: str | None
    with_adapter: str | None


@dataclass(frozen=True)
class _Read:
    sweep: UUID
    with_sweep: UUID
    names: list[tuple[str | None, str | None]]
    pairs: list[list[PromptPairs]]


@router.get("/{sweep_id}/diff")
async def read(sweep_id: str, request: Request, who: Caller = Depends(reads)) -> Response:
    """Against the sweep `with`: each adapter with itself, or `adapter` with `with_adapter`.

    Without `with`, within the sweep: each adapter with the base, or with `with_adapter`.
    """
    query = Query(request)
    asked = _Asked(sweep_id, query.text("with"), query.text("adapter"), query.text("with_adapter"))
    seed = query.whole("seed", SEED, low=0, high=2**63 - 1)
    query.end()
    found = await who.services.sql.run_bulk(who.tenant.id, lambda conn: _read(conn, asked))
    # Seconds of arithmetic for hundreds of adapters, after the transaction.
    columns = await who.services.sql.call(
        lambda: adjust(
            [compare(a, b, pairs, seed=seed) for (a, b), pairs in zip(found.names, found.pairs, strict=True)]
        )
    )
    return answer(Diff(public_id(SWEEP, found.sweep), public_id(SWEEP, found.with_sweep), seed, NUM_RESAMPLES, columns))


def _read(conn: Connection, asked: _Asked) -> _Read:
    sweep = find(conn, asked.sweep)
    other = sweep if asked.with_sweep is None else find(conn, asked.with_sweep)
    mine = {row.adapter: row.column_idx for row in read_columns(conn, sweep)}
    theirs = {row.adapter: row.column_idx for row in read_columns(conn, other)}
    names = _choose(list(mine), list(theirs), asked, is_same=sweep == other)
    return _Read(sweep, other, names, read_pairs(conn, sweep, other, [(mine[a], theirs[b]) for a, b in names]))


def _choose(
    mine: Sequence[str | None], theirs: Sequence[str | None], asked: _Asked, *, is_same: bool
) -> list[tuple[str | None, str | None]]:
    """Which columns are compared with which. Raises InvalidRequest, or Conflict where there is nothing to compare."""
    faults = FaultList()
    for field, name, columns in (("adapter", asked.adapter, mine), ("with_adapter", asked.with_adapter, theirs)):
        if name is not None and _column(name) not in columns:
            wanted = f"an adapter of the sweep, or {BASE} for its base"
            faults.add(Fault(field=field, got=shown_value(name), wanted=wanted))
    faults.raise_any()
    chosen = [_column(asked.adapter)] if asked.adapter is not None else list(mine)
    if asked.with_adapter is not None:
        pairs = [(a, _column(asked.with_adapter)) for a in chosen]
    elif is_same:
        if None not in theirs:
            raise Conflict("the sweep has no base to compare with: give with_adapter, or with, another sweep")
        pairs = [(a, None) for a in chosen]
    else:
        pairs = [(a, a) for a in chosen if a in theirs]
    if is_same:
        pairs = [(a, b) for a, b in pairs if a != b]
    if not pairs:
        if asked.adapter is not None and is_same:
            raise InvalidRequest.of([Fault(field="adapter", got=asked.adapter, wanted="another than with_adapter")])
        raise Conflict("the two have no column in common to compare: give adapter and with_adapter")
    return pairs


def _column(name: str) -> str | None:
    return None if name == BASE else name
