"""Files and batches of the OpenAI-compatible interface."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, LargeBinary, Table, Text, text
from sqlalchemy.dialects.postgresql import JSONB, UUID

from medley.db.models.base import AT, NOW, count, created_at, id_column, metadata, tenant_id

files = Table(
    "files",
    metadata,
    id_column(),
    tenant_id(),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("object_key", Text, nullable=False, unique=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", LargeBinary, nullable=False),
    created_at(),
    Column("expires_at", AT, nullable=False),
    Column("stored_at", AT),
    Column("deleted_at", AT),
    Index("files_tenant_id_id", "tenant_id", "id"),
)

openai_batches = Table(
    "openai_batches",
    metadata,
    Column("id", UUID, ForeignKey("batches.id"), primary_key=True),
    tenant_id(),
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", UUID, nullable=False),
    Column("completion_window", Text, nullable=False),
    Column("metadata", JSONB),
    Column("output_expires_after_s", Integer),
    Column("state", Text, nullable=False, server_default=text("'validating'")),
    Column("due_at", AT, server_default=NOW),
    Column("model", Text),
    count("num_requests"),
    count("num_jobs"),
    Column("next_offset", BigInteger),
    Column("errors", JSONB),
    Column("in_progress_at", AT),
    Column("finalizing_at", AT),
    Column("ended_at", AT),
    Column("num_completed", Integer),
    Column("num_failed", Integer),
    Column("input_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("output_file_id", UUID),
    Column("error_file_id", UUID),
    Column("input_lost_at", AT),
    Index("openai_batches_tenant_id_id", "tenant_id", "id"),
    Index("openai_batches_due_at", "due_at", postgresql_where=text("due_at IS NOT NULL")),
    Index("openai_batches_running", "id", postgresql_where=text("state = 'in_progress' AND due_at IS NULL")),
)

openai_batch_models = Table(
    "openai_batch_models",
    metadata,
    Column("batch_id", UUID, ForeignKey("openai_batches.id"), primary_key=True),
    Column("model", Text, primary_key=True),
    tenant_id(references=False),
    Column("revision_id", UUID),
)
