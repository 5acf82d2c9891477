"""Tenants: their keys, limits, use, audit log and end."""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    Date,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

from medley.db.models.base import AT, NOW, count, created_at, id_column, metadata, tenant_id

tenants = Table(
    "tenants",
    metadata,
    id_column(),
    Column("name", Text, nullable=False, unique=True),
    Column("weight", Double, nullable=False, server_default=text("1")),
    created_at(),
    Column("retention_days", Integer, nullable=False, server_default=text("30")),
    Column("delete_requested_at", AT),
    Column("delete_due_at", AT),
    UniqueConstraint("id", "name"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    tenant_id(),
    Column("secret_sha256", LargeBinary, nullable=False),
    created_at(),
    Column("expires_at", AT),
    Column("revoked_at", AT),
    Column("name", Text),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("last_used_at", AT),
    Column("replaces", Text, ForeignKey("api_keys.id")),
    Index("api_keys_tenant_id", "tenant_id"),
    Index(
        "api_keys_replaces",
        "replaces",
        unique=True,
        postgresql_where=text("replaces IS NOT NULL AND revoked_at IS NULL"),
    ),
)

tenant_limits = Table(
    "tenant_limits",
    metadata,
    Column("tenant_id", UUID, ForeignKey("tenants.id"), primary_key=True),
    Column("queued_jobs", BigInteger),
    Column("queued_bytes", BigInteger),
    Column("adapters", BigInteger),
    Column("storage_bytes", BigInteger),
    Column("requests_per_s", Double),
)

tenant_usage = Table(
    "tenant_usage",
    metadata,
    Column("tenant_id", UUID, ForeignKey("tenants.id"), primary_key=True),
    Column("queued_jobs", BigInteger, nullable=False),
    Column("queued_bytes", BigInteger, nullable=False),
)

usage = Table(
    "usage",
    metadata,
    tenant_id(),
    Column("day", Date, nullable=False),
    Column("revision_id", UUID),
    Column("num_jobs", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    UniqueConstraint("tenant_id", "day", "revision_id", postgresql_nulls_not_distinct=True),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    tenant_id(references=False),
    Column("key_id", Text),
    Column("action", Text, nullable=False),
    Column("object", Text, nullable=False),
    Column("details", JSONB, nullable=False, server_default=text("'{}'")),
    Column("request_id", Text),
    Column("client_address", Text),
    Column("at", AT, nullable=False, server_default=NOW),
    Index("audit_log_tenant_id_id", "tenant_id", "id"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant_id", UUID, ForeignKey("tenants.id"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_sha256", LargeBinary, nullable=False),
    Column("resource_id", UUID, nullable=False),
    created_at(),
    Index("idempotency_keys_created_at", "created_at"),
)

erasures = Table(
    "erasures",
    metadata,
    id_column(),
    Column("name", Text, nullable=False),
    Column("requested_at", AT, nullable=False),
    Column("started_at", AT, nullable=False, server_default=NOW),
    Column("finished_at", AT),
    Column("num_rows", JSONB, nullable=False, server_default=text("'{}'")),
    Column("digests", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    count("num_revisions"),
    count("num_shared"),
)
