"""The end of a tenant: closed at once, erased when it is due, and a certificate of what was erased.

Closed, a tenant has no keys, makes no batch and is told of no event; what waits is cancelled and workers abort what
runs, as for any cancel.
Erased is every row of every table with row-level security where a column is the tenant's: which tables and columns
these are, and in which order they go, is read from the catalogue, so that no later table is forgotten. Each step is a
transaction that counts what it erased, so that an erasure that was cut goes on where it stood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from medley.db.cancels import cancel_batch
from medley.db.connections import allow_minutes
from medley.spec.ids import oldest_after


@dataclass(frozen=True)
class Closing:
    tenant: UUID
    name: str
    due_at: datetime
    is_due: bool


@dataclass(frozen=True)
class Certificate:
    """What an erasure has done. `num_rows` by table; `num_shared`: revisions whose files another tenant has too."""

    tenant: UUID
    name: str
    requested_at: datetime
    started_at: datetime
    finished_at: datetime | None
    num_rows: dict[str, int]
    num_revisions: int
    num_shared: int


# The row's lock waits for creates that are being committed, whose batches `stop_batches` then finds.
_LOCK = text("SELECT FROM tenants WHERE id = :id FOR UPDATE")
_CLOSE = text(
    "UPDATE tenants SET delete_requested_at = coalesce(delete_requested_at, clock_timestamp()), delete_due_at ="
    " least(delete_due_at, statement_timestamp() + make_interval(secs => :grace_s)) WHERE id = :id"
    " RETURNING id, name, delete_due_at, delete_due_at <= statement_timestamp() AS is_due"
)
_REVOKE = text("UPDATE api_keys SET revoked_at = coalesce(revoked_at, clock_timestamp()) WHERE tenant_id = :id")


def close(conn: Connection, tenant: UUID, *, grace_s: float) -> Closing:
    """Closes the tenant, to be erased after `grace_s` seconds; said again, at the earlier of both times."""
    conn.execute(_LOCK, {"id": tenant})
    row = conn.execute(_CLOSE, {"id": tenant, "grace_s": grace_s}).one()
    conn.execute(_REVOKE, {"id": tenant})
    return Closing(*row)


def find_tenant(conn: Connection, name: str) -> UUID | None:
    found: UUID | None = conn.execute(text("SELECT id FROM tenants WHERE name = :name"), {"name": name}).scalar()
    return found


def keep(conn: Connection, tenant: UUID) -> bool:
    """Calls the deletion off. Its keys stay revoked, what was cancelled stays so. False once rows are being erased."""
    conn.execute(_LOCK, {"id": tenant})
    kept = conn.execute(
        text(
            "UPDATE tenants t SET delete_requested_at = NULL, delete_due_at = NULL WHERE id = :id"
            " AND NOT EXISTS (SELECT FROM erasures e WHERE e.id = t.id) RETURNING id"
        ),
        {"id": tenant},
    )
    return kept.one_or_none() is not None


def read_closing(conn: Connection) -> list[Closing]:
    """The tenants that are closed and still there."""
    rows = conn.execute(
        text(
            "SELECT id, name, delete_due_at, delete_due_at <= statement_timestamp() FROM tenants"
            " WHERE delete_due_at IS NOT NULL ORDER BY delete_due_at"
        )
    )
    return [Closing(*row) for row in rows]


def read_unfinished(conn: Connection) -> list[UUID]:
    """Erasures that have begun and not ended."""
    return list(conn.execute(text("SELECT id FROM erasures WHERE finished_at IS NULL ORDER BY id")).scalars())


def stop_batches(conn: Connection, tenant: UUID, limit: int) -> int:
    """Cancels up to `limit` of the tenant's batches. Returns how many; the caller repeats until 0."""
    ids = conn.execute(
        text(
            "SELECT id FROM batches WHERE tenant_id = :id AND finished_at IS NULL AND cancel_requested_at IS NULL"
            " ORDER BY id LIMIT :limit"
        ),
        {"id": tenant, "limit": limit},
    )
    stopped = [batch for batch in ids.scalars().all() if cancel_batch(conn, batch)]
    return len(stopped)


def num_leased(conn: Connection, tenant: UUID) -> int:
    """How many of the tenant's jobs are at workers."""
    statement = "SELECT count(*) FROM jobs WHERE state = 'leased' AND tenant_id = :id"
    count: int = conn.execute(text(statement), {"id": tenant}).scalar_one()
    return count


def begin(conn: Connection, tenant: UUID) -> bool:
    """Begins to erase, or goes on. False where it is not due, or was called off."""
    row = conn.execute(
        text(
            "INSERT INTO erasures (id, name, requested_at) SELECT id, name, delete_requested_at FROM tenants"
            " WHERE id = :id AND delete_due_at <= statement_timestamp() ON CONFLICT (id) DO NOTHING"
        ),
        {"id": tenant},
    )
    if row.rowcount:
        return True
    return conn.execute(text("SELECT 1 FROM erasures WHERE id = :id"), {"id": tenant}).one_or_none() is not None


def is_there(conn: Connection, tenant: UUID) -> bool:
    return conn.execute(text("SELECT 1 FROM tenants WHERE id = :id"), {"id": tenant}).one_or_none() is not None


def read_batches(conn: Connection, tenant: UUID, *, after: UUID | None, limit: int) -> list[UUID]:
    """Up to `limit` of the tenant's batches above `after`, in id order."""
    statement = "SELECT id FROM batches WHERE tenant_id = :id AND id > :after ORDER BY id LIMIT :limit"
    parameters = {"id": tenant, "after": after or UUID(int=0), "limit": limit}
    return list(conn.execute(text(statement), parameters).scalars())


_JOB_TABLES = {"jobs": "id", "checkpoints": "job_id", "job_results": "job_id", "job_inputs": "job_id"}


def erase_jobs(conn: Connection, tenant: UUID, batches: Sequence[UUID], limit: int) -> int:
    """Erases up to `limit` jobs of these batches with all that is theirs. Returns how many; repeated until 0.

    No index leads from a tenant to its jobs: batch by batch they need not be looked for in the whole table.
    """
    if not batches:
        return 0
    jobs = list(
        conn.exec_driver_sql(
            "SELECT job_id FROM job_inputs WHERE batch_id = ANY(%(batches)b::uuid[]) AND job_id >= %(oldest)s"
            " ORDER BY job_id LIMIT %(limit)s",
            {"batches": list(batches), "oldest": oldest_after(min(batches)), "limit": limit},
        ).scalars()
    )
    if not jobs:
        return 0
    bounds = {"jobs": jobs, "first": jobs[0], "last": jobs[-1]}
    for table, column in _JOB_TABLES.items():
        num_rows = conn.exec_driver_sql(
            f"DELETE FROM {table} WHERE {column} = ANY(%(jobs)b::uuid[]) AND {column} BETWEEN %(first)s AND %(last)s",
            bounds,
        ).rowcount
        _count(conn, tenant, table, num_rows)
    return len(jobs)


@dataclass(frozen=True)
class TenantTable:
    """A table with rows of tenants, and its columns that hold whose they are."""

    name: str
    columns: tuple[str, ...]


class NotErasable(Exception):
    """A table's rows cannot be told to be a tenant's, or another's rows need them; the text names it."""


_SECURED = text(
    "SELECT c.relname, ARRAY(SELECT a.attname::text FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0"
    "  AND NOT a.attisdropped AND (a.attname = 'tenant_id' OR EXISTS (SELECT FROM pg_constraint k"
    "   WHERE k.contype = 'f' AND k.conrelid = c.oid AND k.confrelid = 'tenants'::regclass"
    "   AND k.conkey = ARRAY[a.attnum] AND a.atttypid = 'uuid'::regtype)) ORDER BY 1) AS columns"
    " FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relrowsecurity ORDER BY c.relname"
)
_REFERENCES = text(
    "SELECT DISTINCT conrelid::regclass::text AS referring, confrelid::regclass::text AS referred FROM pg_constraint"
    " WHERE contype = 'f' AND conparentid = 0 AND conrelid <> confrelid"
)


def read_tables(conn: Connection) -> list[TenantTable]:
    """Every tenant's table in the order in which they can be erased, `tenants` last. Raises NotErasable.

    Tables without references come after all others: rows of theirs that were committed while the others were gone
    through are met then, or a row that refers to the tenant was too and keeps `tenants` from going.
    """
    tables: dict[str, TenantTable] = {}
    for row in conn.execute(_SECURED):
        columns = ("id",) if row.relname == "tenants" else tuple(row.columns)
        if not columns:
            raise NotErasable(
                f"{row.relname}: got no column tenant_id and no reference to tenants, wanted one: its rows would stay"
            )
        tables[row.relname] = TenantTable(row.relname, columns)
    referring: dict[str, set[str]] = {name: set() for name in tables}
    refers: set[str] = set()
    for reference in conn.execute(_REFERENCES):
        if reference.referred in tables and reference.referring in tables:
            referring[reference.referred].add(reference.referring)
            refers.add(reference.referring)
    ordered: list[TenantTable] = []
    left = sorted(tables, key=lambda name: (name not in refers, name == "tenants", name))
    while left:
        name = next(n for n in left if not referring[n] & set(left))
        left.remove(name)
        ordered.append(tables[name])
    # `tenants` is referred to by all that refers: it would come before those without references.
    return [t for t in ordered if t.name != "tenants"] + [t for t in ordered if t.name == "tenants"]


def erase_table(conn: Connection, tenant: UUID, table: TenantTable) -> int:
    """Erases the tenant's rows of one table. Returns how many. Raises IntegrityError where a row still needs them."""
    allow_minutes(conn)
    if table.name == "adapter_revisions":
        conn.execute(
            text(
                "UPDATE erasures SET digests = ARRAY(SELECT unnest(digests) UNION"
                " SELECT digest FROM adapter_revisions WHERE tenant_id = :id ORDER BY 1) WHERE id = :id"
            ),
            {"id": tenant},
        )
    num_rows: int = conn.execute(
        text("SELECT medley_erase(:id, :name, :columns)"),
        {"id": tenant, "name": table.name, "columns": list(table.columns)},
    ).scalar_one()
    _count(conn, tenant, table.name, num_rows)
    return num_rows


def _count(conn: Connection, tenant: UUID, table: str, num_rows: int) -> None:
    if num_rows:
        conn.execute(
            text(
                "UPDATE erasures SET num_rows = num_rows || jsonb_build_object(CAST(:name AS text),"
                "  coalesce(CAST(num_rows->>:name AS bigint), 0) + :num_rows) WHERE id = :id"
            ),
            {"id": tenant, "name": table, "num_rows": num_rows},
        )


def read_digests(conn: Connection, tenant: UUID) -> list[str]:
    """Of the erased revisions, those whose files have not been seen to."""
    digests: Any = conn.execute(text("SELECT digests FROM erasures WHERE id = :id"), {"id": tenant}).scalar_one()
    return list(digests)


def note_files(conn: Connection, tenant: UUID, digest: str, *, is_shared: bool) -> None:
    """The files of one digest are gone, or stay as another tenant has a revision of them."""
    conn.execute(
        text(
            "UPDATE erasures SET digests = array_remove(digests, :digest),"
            " num_revisions = num_revisions + :gone, num_shared = num_shared + :shared"
            " WHERE id = :id AND :digest = ANY(digests)"
        ),
        {"id": tenant, "digest": digest, "gone": int(not is_shared), "shared": int(is_shared)},
    )


def finish(conn: Connection, tenant: UUID) -> Certificate:
    conn.execute(
        text("UPDATE erasures SET finished_at = coalesce(finished_at, clock_timestamp()) WHERE id = :id"),
        {"id": tenant},
    )
    [certificate] = [c for c in read_certificates(conn) if c.tenant == tenant]
    return certificate


def read_certificates(conn: Connection) -> list[Certificate]:
    """Every erasure there was, those that have not finished too."""
    rows = conn.execute(
        text(
            "SELECT id, name, requested_at, started_at, finished_at, num_rows, num_revisions, num_shared"
            " FROM erasures ORDER BY started_at"
        )
    )
    return [Certificate(*row) for row in rows]
