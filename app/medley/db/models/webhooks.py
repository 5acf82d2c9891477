"""Webhooks, and the events on their way to them."""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    Column,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import UUID

from medley.db.models.base import AT, NOW, count, created_at, id_column, metadata, tenant_id

webhooks = Table(
    "webhooks",
    metadata,
    id_column(),
    tenant_id(),
    Column("url", Text, nullable=False),
    Column("events", ARRAY(Text), nullable=False),
    Column("description", Text),
    Column("batch_id", UUID),
    Column("failed_jobs", Integer),
    Column("secret", LargeBinary, nullable=False),
    Column("previous_secret", LargeBinary),
    Column("previous_until", AT),
    created_at(),
    Column("disabled_at", AT),
    Column("disabled_reason", Text),
    Index("webhooks_tenant_id", "tenant_id", postgresql_where=text("batch_id IS NULL")),
    Index("webhooks_batch_id", "batch_id", postgresql_where=text("batch_id IS NOT NULL")),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", UUID, primary_key=True, server_default=text("gen_random_uuid()")),
    tenant_id(references=False),
    Column("webhook_id", UUID, nullable=False),
    Column("event", Text, nullable=False),
    Column("payload", Text, nullable=False),
    Column("state", Text, nullable=False, server_default=text("'pending'")),
    count("attempt"),
    Column("due_at", AT, server_default=NOW),
    Column("rung_at", AT),
    Column("leased_until", AT),
    Column("status", Integer),
    Column("error", Text),
    created_at(),
    Column("ended_at", AT),
    Index("webhook_deliveries_due_at", "due_at", postgresql_where=text("due_at IS NOT NULL")),
    Index("webhook_deliveries_waiting", "webhook_id", "due_at", postgresql_where=text("due_at IS NOT NULL")),
    Index("webhook_deliveries_webhook_id", "webhook_id", "created_at"),
    Index("webhook_deliveries_tenant_id", "tenant_id", "created_at"),
)
