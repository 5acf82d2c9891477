"""Adapters, their revisions, and grants of them."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import UUID

from medley.db.models.base import AT, NOW, created_at, id_column, metadata, tenant_id

adapters = Table(
    "adapters",
    metadata,
    id_column(),
    tenant_id(),
    Column("name", Text, nullable=False),
    created_at(),
    Column("deleted_at", AT),
    UniqueConstraint("tenant_id", "name"),
    UniqueConstraint("id", "tenant_id"),
)

adapter_revisions = Table(
    "adapter_revisions",
    metadata,
    id_column(),
    tenant_id(),
    Column("adapter_id", UUID, ForeignKey("adapters.id"), nullable=False),
    Column("digest", Text, nullable=False),
    Column("max_rank", Integer, nullable=False),
    Column("num_tiles", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    created_at(),
    Column("uploaded_at", AT, nullable=False, server_default=NOW),
    Column("quarantined_at", AT),
    Column("forgotten_at", AT),
    UniqueConstraint("adapter_id", "digest"),
    UniqueConstraint("id", "adapter_id"),
    Index("adapter_revisions_tenant_id", "tenant_id"),
    Index("adapter_revisions_digest", "digest"),
)

adapter_grants = Table(
    "adapter_grants",
    metadata,
    id_column(),
    Column("tenant_id", UUID, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("owner", Text, nullable=False),
    Column("adapter_id", UUID, nullable=False),
    Column("revision_id", UUID),
    Column("grantee", Text, ForeignKey("tenants.name", onupdate="CASCADE", ondelete="CASCADE"), nullable=False),
    created_at(),
    Column("revoked_at", AT),
    CheckConstraint("grantee <> owner"),
    ForeignKeyConstraint(
        ["tenant_id", "owner"], ["tenants.id", "tenants.name"], onupdate="CASCADE", ondelete="CASCADE"
    ),
    ForeignKeyConstraint(["adapter_id", "tenant_id"], ["adapters.id", "adapters.tenant_id"], ondelete="CASCADE"),
    ForeignKeyConstraint(
        ["revision_id", "adapter_id"], ["adapter_revisions.id", "adapter_revisions.adapter_id"], ondelete="CASCADE"
    ),
    Index(
        "adapter_grants_live",
        "adapter_id",
        "grantee",
        "revision_id",
        unique=True,
        postgresql_nulls_not_distinct=True,
        postgresql_where=text("revoked_at IS NULL"),
    ),
    Index("adapter_grants_grantee", "grantee", postgresql_where=text("revoked_at IS NULL")),
    Index("adapter_grants_tenant_id", "tenant_id"),
)
