"""Sweeps extended: prompts, columns and seeds added to a sweep that is there, of which only the missing cells run.

An extension is a part of the sweep (`sweep_parts`). What was there keeps its place and its revision, so results that
exist stay cells of the larger sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from medley.db.batches import TenantClosing
from medley.db.sweeps import SweepColumn, SweepPrompt, add_columns, add_part, add_prompts, as_tuple


class NotExtended(Exception):
    """The sweep stands so that new cells would only end at once; the text says how to change that."""


@dataclass(frozen=True)
class Extension:
    """What a sweep has not yet. `definition_sha256`: of the declaration that asks for it, where it is one."""

    prompts: Sequence[SweepPrompt]
    columns: Sequence[SweepColumn]
    seeds: Sequence[int]
    definition_sha256: bytes | None = None

    @property
    def is_empty(self) -> bool:
        return not (self.prompts or self.columns or self.seeds)


def read_prompts(conn: Connection, sweep: UUID) -> list[SweepPrompt]:
    """The sweep's prompts, in order."""
    rows = conn.execute(
        text(
            "SELECT prompt, prompt_token_ids, expected, custom_id, only_adapter, continuation, continuation_token_ids"
            " FROM sweep_prompts WHERE sweep_id = :id ORDER BY prompt_idx"
        ),
        {"id": sweep},
    )
    return [
        SweepPrompt(
            row.prompt,
            as_tuple(row.prompt_token_ids),
            row.expected,
            row.custom_id,
            row.only_adapter,
            row.continuation,
            as_tuple(row.continuation_token_ids),
        )
        for row in rows
    ]


def lock_sweep(conn: Connection, sweep: UUID) -> Row[Any]:
    """The sweep's row with its batch's (`total`, `deadline_at`, ...), locked against expanders and other extensions."""
    conn.execute(text("SELECT FROM batches WHERE id = :id FOR NO KEY UPDATE"), {"id": sweep})
    return conn.execute(
        text(
            "SELECT s.*, b.total, b.cancel_requested_at,"
            " coalesce(b.deadline_at <= clock_timestamp(), false) AS is_late,"
            " t.delete_requested_at IS NOT NULL AS is_closing"
            " FROM sweeps s JOIN batches b ON b.id = s.id JOIN tenants t ON t.id = s.tenant_id WHERE s.id = :id"
        ),
        {"id": sweep},
    ).one()


def extend_sweep(conn: Connection, sweep: Row[Any], extension: Extension) -> int:
    """Adds `extension` to a row of `lock_sweep`. Returns how many cells are new; they become jobs soon.

    Raises NotExtended and TenantClosing, after which nothing of the transaction may stand.
    """
    if extension.definition_sha256 is not None:
        _declare(conn, sweep, extension.definition_sha256)
    if extension.is_empty:
        return 0
    if sweep.is_closing:
        raise TenantClosing
    if sweep.cancel_requested_at is not None:
        raise NotExtended("it was cancelled; retry what was cancelled first, or take another name")
    if sweep.is_late:
        raise NotExtended("its deadline has passed; change deadline_at first (PATCH), to null for none")
    add_prompts(conn, sweep.tenant_id, sweep.id, extension.prompts, first_idx=sweep.num_prompts)
    add_columns(conn, sweep.tenant_id, sweep.id, extension.columns, first_idx=sweep.num_columns)
    conn.execute(
        text(
            "UPDATE sweeps SET num_prompts = num_prompts + :prompts, num_columns = num_columns + :columns,"
            " seeds = seeds || CAST(:seeds AS bigint[]), expand_due_at = clock_timestamp() WHERE id = :id"
        ),
        {
            "id": sweep.id,
            "prompts": len(extension.prompts),
            "columns": len(extension.columns),
            "seeds": list(extension.seeds),
        },
    )
    total = add_part(conn, sweep.id)
    conn.execute(
        # A column may have no cell yet, where prompts belong to others: then nothing is left to end.
        text(
            "UPDATE batches SET total = :total, finished_at = CASE WHEN total = :total THEN finished_at END"
            " WHERE id = :id"
        ),
        {"id": sweep.id, "total": total},
    )
    return total - int(sweep.total)


def _declare(conn: Connection, sweep: Row[Any], digest: bytes) -> None:
    """The definition becomes the sweep's; those that it had before still find it."""
    conn.execute(
        text(
            "UPDATE sweeps SET past_definitions = array_append(past_definitions, definition_sha256),"
            " definition_sha256 = :digest WHERE id = :id AND definition_sha256 <> :digest"
        ),
        {"id": sweep.id, "digest": digest},
    )


def is_known_definition(sweep: Row[Any], digest: bytes) -> bool:
    """Whether the sweep is, or was, declared with this definition."""
    return digest == bytes(sweep.definition_sha256) or digest in map(bytes, sweep.past_definitions)
