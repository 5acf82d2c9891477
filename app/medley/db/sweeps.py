"""Sweeps: prompts x columns (adapter revisions, and the base) x seeds, stored once and expanded by the service.

Cells are numbered prompt-major, so that one adapter's jobs spread over the whole run and every column progresses:
cell = (prompt_idx * num_seeds + seed_idx) * num_columns + column_idx. A prompt that belongs to one adapter alone
has cells for that adapter and the base only, so cells are the rows of `_CELLS`, in that order. Progress is kept as a
prompt and the number of its cells that have become jobs: counted from the first cell, each chunk would make all
earlier ones again. A sweep that was extended has several parts, expanded one after the other: `sweep_parts` keeps the
size with each, and `medley.db.sweep_parts` makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from medley.db.batches import NewBatch, lock_batches, open_batch
from medley.db.connections import plan_anew
from medley.db.demand import array_literal
from medley.db.ends import End, end_unclaimed
from medley.db.new_jobs import NewJob, append_jobs
from medley.spec.ids import oldest_after
from medley.spec.jobs import JobState

EXPAND_RING_S = 5.0  # seconds after which an expansion that has not moved is rung again


@dataclass(frozen=True)
class SweepPrompt:
    """One prompt; equal ones are the same prompt."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...] | None
    expected: str | None
    custom_id: str | None
    only_adapter: str | None
    continuation: str | None = None
    continuation_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SweepColumn:
    adapter: str | None  # None: the base
    revision: UUID | None


@dataclass(frozen=True)
class NewSweep:
    name: str
    definition_sha256: bytes
    sampling: str  # JSON
    seeds: Sequence[int]
    prompts: Sequence[SweepPrompt]
    columns: Sequence[SweepColumn]

    @property
    def num_cells(self) -> int:
        by_adapter = {c.adapter for c in self.columns}
        base = None in by_adapter
        own = sum(
            len(self.columns) if p.only_adapter is None else (p.only_adapter in by_adapter) + base for p in self.prompts
        )
        return own * len(self.seeds)


def as_tuple(token_ids: Sequence[int] | None) -> tuple[int, ...] | None:
    """Token ids as a `SweepPrompt` has them."""
    return None if token_ids is None else tuple(token_ids)


def prompt_bytes(prompts: Sequence[SweepPrompt]) -> int:
    """What the prompts count in a quota: once, however many cells run them."""
    return sum(len(p.prompt.encode()) if p.prompt else 4 * len(p.prompt_token_ids or ()) for p in prompts)


def find_sweep(conn: Connection, name: str) -> Row[Any] | None:
    """The caller's sweep of that name; one that is kept no longer is none."""
    statement = "SELECT s.* FROM sweeps s JOIN batches b ON b.id = s.id WHERE s.name = :name"
    return conn.execute(text(statement), {"name": name}).one_or_none()


def read_columns(conn: Connection, sweep: UUID) -> Sequence[Row[Any]]:
    """(column_idx, adapter, revision_id) of a sweep, in order."""
    statement = "SELECT column_idx, adapter, revision_id FROM sweep_columns WHERE sweep_id = :id ORDER BY column_idx"
    return conn.execute(text(statement), {"id": sweep}).all()


def create_sweep(conn: Connection, batch: NewBatch, sweep: NewSweep) -> None:
    """Writes batch, sweep, prompts and columns in one transaction. Raises IntegrityError for a name that is taken."""
    open_batch(conn, batch, total=sweep.num_cells)
    conn.execute(
        text(
            "INSERT INTO sweeps (id, tenant_id, name, definition_sha256, sampling, seeds, num_prompts, num_columns,"
            " expand_due_at) VALUES (:id, :tenant, :name, :digest, CAST(:sampling AS jsonb), :seeds, :num_prompts,"
            " :num_columns, clock_timestamp())"
        ),
        {
            "id": batch.id,
            "tenant": batch.tenant,
            "name": sweep.name,
            "digest": sweep.definition_sha256,
            "sampling": sweep.sampling,
            "seeds": list(sweep.seeds),
            "num_prompts": len(sweep.prompts),
            "num_columns": len(sweep.columns),
        },
    )
    add_prompts(conn, batch.tenant, batch.id, sweep.prompts)
    add_columns(conn, batch.tenant, batch.id, sweep.columns)
    add_part(conn, batch.id)


def add_prompts(
    conn: Connection, tenant: UUID, sweep: UUID, prompts: Sequence[SweepPrompt], *, first_idx: int = 0
) -> None:
    """Writes prompts, numbered from `first_idx`."""
    conn.exec_driver_sql(
        "INSERT INTO sweep_prompts (sweep_id, prompt_idx, tenant_id, custom_id, prompt, prompt_token_ids, expected,"
        " only_adapter, continuation, continuation_token_ids) SELECT %(sweep)s, %(first)s + r.ord - 1, %(tenant)s,"
        " r.custom_id, r.prompt, r.token_ids::int4[], r.expected, r.only_adapter, r.continuation,"
        " r.continuation_ids::int4[] FROM unnest(%(custom_ids)b::text[], %(prompts)b::text[], %(token_ids)b::text[],"
        " %(expected)b::text[], %(only)b::text[], %(continuations)b::text[], %(continuation_ids)b::text[])"
        " WITH ORDINALITY"
        " AS r(custom_id, prompt, token_ids, expected, only_adapter, continuation, continuation_ids, ord)",
        {
            "sweep": sweep,
            "tenant": tenant,
            "first": first_idx,
            "custom_ids": [p.custom_id for p in prompts],
            "prompts": [p.prompt for p in prompts],
            "token_ids": [_literal(p.prompt_token_ids) for p in prompts],
            "expected": [p.expected for p in prompts],
            "only": [p.only_adapter for p in prompts],
            "continuations": [p.continuation for p in prompts],
            "continuation_ids": [_literal(p.continuation_token_ids) for p in prompts],
        },
    )


def _literal(token_ids: Sequence[int] | None) -> str | None:
    return None if token_ids is None else array_literal(token_ids)


def add_columns(
    conn: Connection, tenant: UUID, sweep: UUID, columns: Sequence[SweepColumn], *, first_idx: int = 0
) -> None:
    """Writes columns, numbered from `first_idx`."""
    conn.exec_driver_sql(
        "INSERT INTO sweep_columns (sweep_id, column_idx, tenant_id, adapter, revision_id)"
        " SELECT %(sweep)s, %(first)s + r.ord - 1, %(tenant)s, r.adapter, r.revision"
        " FROM unnest(%(adapters)b::text[], %(revisions)b::uuid[]) WITH ORDINALITY AS r(adapter, revision, ord)",
        {
            "sweep": sweep,
            "tenant": tenant,
            "first": first_idx,
            "adapters": [c.adapter for c in columns],
            "revisions": [c.revision for c in columns],
        },
    )


_ADD_PART = text(
    "INSERT INTO sweep_parts (sweep_id, part_idx, tenant_id, num_prompts, num_columns, num_seeds)"
    " SELECT s.id, coalesce((SELECT max(part_idx) + 1 FROM sweep_parts p WHERE p.sweep_id = s.id), 0), s.tenant_id,"
    "  s.num_prompts, s.num_columns, cardinality(s.seeds) FROM sweeps s WHERE s.id = :id"
)

# A prompt that belongs to one adapter alone counts for that one and for the base.
_COUNT_CELLS = text(
    "WITH own AS (SELECT only_adapter, count(*) AS num FROM sweep_prompts WHERE sweep_id = :id GROUP BY only_adapter),"
    " columns AS (SELECT c.*, cardinality(s.seeds) * (SELECT coalesce(sum(own.num), 0) FROM own"
    "   WHERE own.only_adapter IS NULL OR c.adapter IS NULL OR own.only_adapter = c.adapter) AS total"
    "  FROM sweeps s JOIN sweep_columns c ON c.sweep_id = s.id WHERE s.id = :id),"
    " counted AS (INSERT INTO batch_lanes AS l (batch_id, tenant_id, revision_id, adapter, total)"
    "  SELECT sweep_id, tenant_id, revision_id, adapter, total FROM columns"
    "  ON CONFLICT (batch_id, revision_id) DO UPDATE SET total = excluded.total)"
    " SELECT sum(total) FROM columns"
)


def add_part(conn: Connection, sweep: UUID) -> int:
    """Makes the sweep as it stands in its row its newest part. Returns how many cells it has in all.

    Counts the cells of each column, those that are no jobs yet among them.
    """
    conn.execute(_ADD_PART, {"id": sweep})
    return int(conn.execute(_COUNT_CELLS, {"id": sweep}).scalar_one())


# The cells of a part: those within its size, without those within the size of the part before (`before_*`).
_CELLS = text(
    "SELECT p.prompt_idx, c.column_idx, q.seed, p.custom_id, c.adapter, c.revision_id,"
    " coalesce(cardinality(p.prompt_token_ids), octet_length(p.prompt) / 4 + 1)"
    " + coalesce(cardinality(p.continuation_token_ids), octet_length(p.continuation) / 4 + 1, 0) AS est_prompt_tokens,"
    " num_nonnulls(p.continuation, p.continuation_token_ids) > 0 AS is_scored,"
    " r.quarantined_at, r.tenant_id <> p.tenant_id AND NOT medley_may_use(p.tenant_id, r.id) AS is_revoked,"
    " d.deleted_at IS NOT NULL AS is_deleted"
    # As many prompts as have `num_skipped + limit` cells for certain: all columns, or one at the least.
    " FROM (SELECT n.*, sum(n.num_cells) OVER (ORDER BY n.prompt_idx) - n.num_cells AS num_before FROM ("
    "  SELECT w.*, CASE WHEN w.only_adapter IS NULL THEN"
    "    z.num_columns * z.num_seeds - CASE WHEN w.prompt_idx < z.before_prompts"
    "     THEN z.before_columns * z.before_seeds ELSE 0 END"
    "   WHEN w.prompt_idx < z.before_prompts AND z.num_seeds > z.before_seeds THEN z.num_seeds - z.before_seeds"
    "   ELSE z.num_seeds END AS num_cells, z.num_columns, z.before_prompts, z.before_columns, z.before_seeds"
    "  FROM sweep_prompts w CROSS JOIN ("
    "   SELECT CAST(:num_columns AS bigint) AS num_columns, CAST(:num_seeds AS bigint) AS num_seeds,"
    "    CAST(:before_prompts AS int) AS before_prompts, CAST(:before_columns AS bigint) AS before_columns,"
    "    CAST(:before_seeds AS bigint) AS before_seeds) z"
    "  WHERE w.sweep_id = :sweep AND w.prompt_idx >= :next_prompt AND w.prompt_idx < :num_prompts"
    # Only prompts that have a cell here.
    "   AND (w.prompt_idx >= z.before_prompts OR z.num_seeds > z.before_seeds OR EXISTS ("
    "    SELECT FROM sweep_columns o WHERE o.sweep_id = w.sweep_id AND o.column_idx >= z.before_columns"
    "     AND o.column_idx < z.num_columns"
    "     AND (w.only_adapter IS NULL OR o.adapter IS NULL OR o.adapter = w.only_adapter)))"
    "  ORDER BY w.prompt_idx LIMIT CAST(:limit AS int) + 1"
    " ) n) p CROSS JOIN unnest(CAST(:seeds AS bigint[])) WITH ORDINALITY AS q(seed, seed_idx)"
    " JOIN sweep_columns c ON c.sweep_id = p.sweep_id AND c.column_idx < p.num_columns"
    "  AND (p.only_adapter IS NULL OR c.adapter IS NULL OR c.adapter = p.only_adapter)"
    "  AND NOT (p.prompt_idx < p.before_prompts AND c.column_idx < p.before_columns AND q.seed_idx <= p.before_seeds)"
    " LEFT JOIN adapter_revisions r ON r.id = c.revision_id LEFT JOIN adapters d ON d.id = r.adapter_id"
    " WHERE p.num_before < CAST(:num_skipped AS bigint) + CAST(:limit AS int)"
    " ORDER BY p.prompt_idx, q.seed_idx, c.column_idx OFFSET :num_skipped LIMIT :limit"
)

_READ_EXPANSION = text(
    "SELECT s.*, s.sampling->>'max_tokens' AS max_tokens, b.pool, b.priority, b.deadline_at, b.total,"
    " b.paused_at, b.cancel_requested_at, p.num_prompts AS part_prompts, p.num_columns AS part_columns,"
    " p.num_seeds AS part_seeds, coalesce(f.num_prompts, 0) AS before_prompts,"
    " coalesce(f.num_columns, 0) AS before_columns, coalesce(f.num_seeds, 0) AS before_seeds"
    " FROM sweeps s JOIN batches b ON b.id = s.id"
    " JOIN sweep_parts p ON p.sweep_id = s.id AND p.part_idx = s.next_part_idx"
    " LEFT JOIN sweep_parts f ON f.sweep_id = s.id AND f.part_idx = s.next_part_idx - 1"
    " WHERE s.id = :id AND s.expand_due_at IS NOT NULL"
)


def expand(conn: Connection, sweep_id: UUID, *, limit: int) -> bool:
    """Turns the next `limit` cells into jobs; progress and jobs are one transaction. Returns whether all are done.

    Several expanders at once are harmless: the batch's row is locked and the progress read under it.
    """
    lock_batches(conn, [sweep_id])
    row = conn.execute(_READ_EXPANSION, {"id": sweep_id}).one_or_none()
    if row is None:
        return True
    cells = _read_cells(conn, row, limit)
    batch = NewBatch(row.id, row.tenant_id, row.pool, priority=row.priority, deadline_at=row.deadline_at)
    jobs = [_cell_job(cell, int(row.max_tokens)) for cell in cells]
    ids = append_jobs(conn, batch, jobs, is_held=row.paused_at is not None, are_counted=True) if jobs else []
    num_expanded = row.num_expanded + len(cells)
    done = num_expanded >= row.total
    part_idx, next_prompt, next_num_expanded = row.next_part_idx, *_position(row, cells)
    if done or len(cells) < limit:
        part_idx, next_prompt, next_num_expanded = row.next_part_idx + 1, 0, 0
    conn.execute(
        text(
            "UPDATE sweeps SET num_expanded = :num_expanded, next_part_idx = :part_idx,"
            " next_prompt_idx = :next_prompt, next_num_expanded = :next_num_expanded, expand_due_at ="
            " CASE WHEN :done THEN NULL ELSE clock_timestamp() + make_interval(secs => :ring_s) END WHERE id = :id"
        ),
        {
            "id": sweep_id,
            "num_expanded": num_expanded,
            "part_idx": part_idx,
            "next_prompt": next_prompt,
            "next_num_expanded": next_num_expanded,
            "done": done,
            "ring_s": EXPAND_RING_S,
        },
    )
    if row.cancel_requested_at is not None:
        end_unclaimed(conn, ids, End(JobState.CANCELLED))
    else:
        made = list(zip(ids, cells, strict=True))
        end_unclaimed(conn, [job for job, cell in made if cell.quarantined_at is not None], End.quarantined())
        end_unclaimed(conn, [job for job, cell in made if cell.is_revoked], End.revoked())
        end_unclaimed(conn, [job for job, cell in made if cell.is_deleted], End.deleted())
    return bool(done)


def _read_cells(conn: Connection, sweep: Row[Any], limit: int) -> Sequence[Row[Any]]:
    """The next `limit` cells of the part, fewer only where it ends."""
    return conn.execute(
        _CELLS,
        {
            "sweep": sweep.id,
            "seeds": sweep.seeds[: sweep.part_seeds],
            "num_prompts": sweep.part_prompts,
            "num_columns": sweep.part_columns,
            "num_seeds": sweep.part_seeds,
            "before_prompts": sweep.before_prompts,
            "before_columns": sweep.before_columns,
            "before_seeds": sweep.before_seeds,
            "next_prompt": sweep.next_prompt_idx,
            "num_skipped": sweep.next_num_expanded,
            "limit": limit,
        },
    ).all()


def _position(sweep: Row[Any], cells: Sequence[Row[Any]]) -> tuple[int, int]:
    """The last prompt of which cells have become jobs, and how many have, once `cells` are jobs too."""
    prompt = cells[-1].prompt_idx if cells else sweep.next_prompt_idx
    before = sweep.next_num_expanded if prompt == sweep.next_prompt_idx else 0
    return prompt, before + sum(cell.prompt_idx == prompt for cell in cells)


def _cell_job(cell: Row[Any], max_tokens: int) -> NewJob:
    # The prompt itself stands in sweep_prompts, once.
    return NewJob(
        prompt=None,
        prompt_token_ids=None,
        revision=cell.revision_id,
        adapter=cell.adapter,
        sampling=None,
        max_tokens=0 if cell.is_scored else max_tokens,
        seed=cell.seed,
        custom_id=cell.custom_id,
        prompt_idx=cell.prompt_idx,
        column_idx=cell.column_idx,
        est_prompt_tokens=cell.est_prompt_tokens,
    )


def read_unexpanded(conn: Connection) -> dict[UUID, int]:
    """{sweep: cells that have become jobs} of each sweep that is not yet whole."""
    rows = conn.execute(text("SELECT id, num_expanded FROM sweeps WHERE expand_due_at IS NOT NULL"))
    return {row.id: row.num_expanded for row in rows}


def due_expansions(conn: Connection) -> list[UUID]:
    """Sweeps whose expansion is to be rung (again); pushes their due time on, so that each is rung once a while."""
    return list(
        conn.execute(
            text(
                "UPDATE sweeps SET expand_due_at = clock_timestamp() + make_interval(secs => :ring_s)"
                " WHERE expand_due_at <= clock_timestamp() RETURNING id"
            ),
            {"ring_s": EXPAND_RING_S},
        ).scalars()
    )


_REPORT = text(
    "SELECT c.column_idx, c.adapter, count(r.job_id) AS num_ended,"
    " count(*) FILTER (WHERE r.state = 'succeeded') AS num_succeeded,"
    " count(*) FILTER (WHERE r.state IN ('failed', 'expired', 'cancelled')) AS num_unsuccessful,"
    " count(*) FILTER (WHERE p.expected IS NOT NULL AND r.state = 'succeeded') AS num_scored,"
    " count(*) FILTER (WHERE p.expected IS NOT NULL AND r.state = 'succeeded'"
    "  AND btrim(r.text, E' \\t\\r\\n') = btrim(p.expected, E' \\t\\r\\n')) AS num_correct,"
    " max(l.completion_tokens) AS completion_tokens"
    " FROM sweep_columns c"
    " LEFT JOIN batch_lanes l ON l.batch_id = c.sweep_id"
    "  AND coalesce(l.revision_id, l.tenant_id) = coalesce(c.revision_id, c.tenant_id)"
    " LEFT JOIN job_inputs i ON i.batch_id = c.sweep_id AND i.column_idx = c.column_idx AND i.job_id >= :oldest"
    " LEFT JOIN job_results r ON r.job_id = i.job_id AND r.job_id >= :oldest AND r.retried_by IS NULL"
    " LEFT JOIN sweep_prompts p ON p.sweep_id = c.sweep_id AND p.prompt_idx = i.prompt_idx"
    " WHERE c.sweep_id = :sweep GROUP BY c.column_idx, c.adapter ORDER BY c.column_idx"
)

# The base on the very prompts of an adapter: what the adapter is compared with.
_BASE_REPORT = text(
    "SELECT coalesce(p.only_adapter, '') AS only_adapter, count(*) AS num_scored,"
    " count(*) FILTER (WHERE btrim(r.text, E' \\t\\r\\n') = btrim(p.expected, E' \\t\\r\\n')) AS num_correct"
    " FROM sweep_columns c JOIN job_inputs i ON i.batch_id = c.sweep_id AND i.column_idx = c.column_idx"
    "  AND i.job_id >= :oldest JOIN job_results r ON r.job_id = i.job_id AND r.job_id >= :oldest"
    "  AND r.state = 'succeeded'"
    " JOIN sweep_prompts p ON p.sweep_id = c.sweep_id AND p.prompt_idx = i.prompt_idx AND p.expected IS NOT NULL"
    " WHERE c.sweep_id = :sweep AND c.adapter IS NULL GROUP BY 1"
)


def report(conn: Connection, sweep_id: UUID) -> tuple[Sequence[Row[Any]], dict[str, tuple[int, int]]]:
    """(rows by column, {only_adapter or "": (scored, correct) of the base}): exact match after trimming blanks."""
    plan_anew(conn)
    parameters = {"sweep": sweep_id, "oldest": oldest_after(sweep_id)}
    columns = conn.execute(_REPORT, parameters).all()
    base = {row.only_adapter: (row.num_scored, row.num_correct) for row in conn.execute(_BASE_REPORT, parameters)}
    return columns, base
