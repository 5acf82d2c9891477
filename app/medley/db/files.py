"""A tenant's files: their rows. The bytes lie in the object store under `object_key`.

A row is written before its bytes and shown after them, so that whatever dies in between leaves a row by which the
bytes are found and deleted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

BATCH_INPUT, BATCH_OUTPUT = "batch", "batch_output"  # purposes
DEFAULT_EXPIRES_S = 30 * 24 * 3600  # as OpenAI documents it


def object_prefix(tenant: UUID) -> str:
    """What the keys of a tenant's objects begin with, and no other's."""
    return f"files/{tenant.hex}/"


@dataclass(frozen=True, kw_only=True)
class NewFile:
    id: UUID
    tenant: UUID
    purpose: str
    filename: str
    size_bytes: int
    sha256: bytes
    expires_after_s: int = DEFAULT_EXPIRES_S

    @property
    def object_key(self) -> str:
        return f"{object_prefix(self.tenant)}{self.id.hex}"


def begin_file(conn: Connection, file: NewFile) -> None:
    """Writes the row of a file whose bytes come next. Nobody sees it before `finish_file`."""
    conn.execute(
        text(
            "INSERT INTO files (id, tenant_id, purpose, filename, object_key, size_bytes, sha256, created_at,"
            " expires_at) SELECT :id, :tenant, :purpose, :filename, :key, :size, :sha256, at,"
            " at + make_interval(secs => :expires) FROM (SELECT clock_timestamp() AS at) now"
        ),
        {
            "id": file.id,
            "tenant": file.tenant,
            "purpose": file.purpose,
            "filename": file.filename,
            "key": file.object_key,
            "size": file.size_bytes,
            "sha256": file.sha256,
            "expires": file.expires_after_s,
        },
    )


def finish_file(conn: Connection, file: UUID) -> bool:
    """Shows a file whose bytes are stored. False where its row was given up meanwhile."""
    row = conn.execute(
        text("UPDATE files SET stored_at = clock_timestamp() WHERE id = :id AND deleted_at IS NULL RETURNING id"),
        {"id": file},
    ).one_or_none()
    return row is not None


_SHOWN = "stored_at IS NOT NULL AND deleted_at IS NULL AND expires_at > clock_timestamp()"


def read_file(conn: Connection, file: UUID) -> Row[Any] | None:
    return conn.execute(text(f"SELECT * FROM files WHERE id = :id AND {_SHOWN}"), {"id": file}).one_or_none()


def list_files(
    conn: Connection, *, after: UUID | None, limit: int, is_ascending: bool, purpose: str | None
) -> Sequence[Row[Any]]:
    """The caller's files beyond `after`, by creation."""
    beyond, order = (">", "ASC") if is_ascending else ("<", "DESC")
    statement = (
        f"SELECT * FROM files WHERE {_SHOWN} AND (CAST(:after AS uuid) IS NULL OR id {beyond} CAST(:after AS uuid))"
        f" AND (CAST(:purpose AS text) IS NULL OR purpose = CAST(:purpose AS text)) ORDER BY id {order} LIMIT :limit"
    )
    return conn.execute(text(statement), {"after": after, "purpose": purpose, "limit": limit}).all()


def delete_file(conn: Connection, file: UUID) -> bool:
    """Hides the file; its bytes go soon. False where there is none."""
    statement = f"UPDATE files SET deleted_at = clock_timestamp() WHERE id = :id AND {_SHOWN} RETURNING id"
    return conn.execute(text(statement), {"id": file}).one_or_none() is not None


def give_up_files(conn: Connection, files: Sequence[UUID]) -> None:
    """Marks files that were begun, and will not be finished, as deleted."""
    statement = "UPDATE files SET deleted_at = clock_timestamp() WHERE id = ANY(:ids) AND stored_at IS NULL"
    conn.execute(text(statement), {"ids": list(files)})


def read_object_key(conn: Connection, file: UUID) -> str | None:
    """Where the bytes of a stored file lie, shown or not: a batch that began with it goes on with it."""
    statement = "SELECT object_key FROM files WHERE id = :id AND stored_at IS NOT NULL"
    key: str | None = conn.execute(text(statement), {"id": file}).scalar_one_or_none()
    return key


def read_unwanted(conn: Connection, *, unstored_after_s: float, limit: int) -> Sequence[Row[Any]]:
    """(id, object_key) of files that nobody is to see any more: deleted, expired, older than their tenant keeps
    anything, or not finished within `unstored_after_s`. One that a batch still reads is left out.
    """
    statement = (
        "SELECT f.id, f.object_key FROM files f JOIN tenants t ON t.id = f.tenant_id WHERE (f.deleted_at IS NOT NULL"
        "  OR f.expires_at <= statement_timestamp()"
        "  OR f.created_at <= statement_timestamp() - make_interval(days => t.retention_days)"
        "  OR (f.stored_at IS NULL AND f.created_at < statement_timestamp() - make_interval(secs => :age)))"
        " AND NOT EXISTS (SELECT FROM openai_batches o WHERE o.input_file_id = f.id AND o.due_at IS NOT NULL"
        "  AND o.state IN ('validating', 'in_progress')) LIMIT :limit"
    )
    return conn.execute(text(statement), {"age": unstored_after_s, "limit": limit}).all()


def forget_files(conn: Connection, files: Sequence[UUID]) -> None:
    """Deletes the rows of files whose bytes are gone."""
    conn.execute(text("DELETE FROM files WHERE id = ANY(:ids)"), {"ids": list(files)})
