"""Batches, with their counts by lane and what is expected of them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    Index,
    Integer,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import UUID

from medley.db.models.base import AT, NOW, count, created_at, id_column, metadata, tenant_id


def _recent() -> tuple[Column[object], ...]:
    """The ends by workers of late, from which a rate is read."""
    return (
        Column("recent_num", Double, nullable=False, server_default=text("0")),
        Column("recent_at", AT),
        Column("recent_since", AT),
    )


batches = Table(
    "batches",
    metadata,
    id_column(),
    tenant_id(),
    Column("pool", Text, nullable=False),
    Column("name", Text),
    Column("priority", SmallInteger, nullable=False, server_default=text("1")),
    Column("deadline_at", AT),
    created_at(),
    Column("paused_at", AT),
    Column("cancel_requested_at", AT),
    Column("finished_at", AT),
    Column("total", Integer, nullable=False),
    count("succeeded"),
    count("failed"),
    count("cancelled"),
    count("expired"),
    count("prompt_tokens", BigInteger),
    count("completion_tokens", BigInteger),
    count("last_seq", BigInteger),
    count("queued_bytes", BigInteger),
    Column("is_single", Boolean, nullable=False, server_default=text("false")),
    count("retried"),
    *_recent(),
    CheckConstraint("succeeded + failed + cancelled + expired <= total"),
    Index("batches_tenant_id_id", "tenant_id", "id"),
    Index(
        "batches_tenant_id_finished_at", "tenant_id", "finished_at", postgresql_where=text("finished_at IS NOT NULL")
    ),
    Index("batches_open", "pool", "id", postgresql_where=text("finished_at IS NULL")),
    Index(
        "batches_due",
        "pool",
        "deadline_at",
        postgresql_where=text("finished_at IS NULL AND deadline_at IS NOT NULL"),
    ),
)

batch_lanes = Table(
    "batch_lanes",
    metadata,
    Column("batch_id", UUID, nullable=False),
    tenant_id(references=False),
    Column("revision_id", UUID),
    Column("adapter", Text),
    count("total"),
    count("succeeded"),
    count("failed"),
    count("cancelled"),
    count("expired"),
    count("prompt_tokens", BigInteger),
    count("completion_tokens", BigInteger),
    *_recent(),
    UniqueConstraint("batch_id", "revision_id", postgresql_nulls_not_distinct=True),
)

batch_failures = Table(
    "batch_failures",
    metadata,
    Column("batch_id", UUID, nullable=False),
    tenant_id(references=False),
    Column("revision_id", UUID),
    Column("code", Text, nullable=False),
    Column("num_jobs", Integer, nullable=False),
    UniqueConstraint("batch_id", "revision_id", "code", postgresql_nulls_not_distinct=True),
)

batch_forecasts = Table(
    "batch_forecasts",
    metadata,
    id_column("batch_id"),
    tenant_id(references=False),
    Column("ends_at", AT, nullable=False),
    Column("is_late", Boolean, nullable=False),
    Column("made_at", AT, nullable=False, server_default=NOW),
)
