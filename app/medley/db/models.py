"""The tables as SQLAlchemy knows them. The migrations make them; a test holds the two equal.

What each table and column is for stands beside its DDL in `migrations/versions`.
"""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, REAL, TIMESTAMP, UUID

metadata = MetaData(
    naming_convention={
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    }
)

AT = TIMESTAMP(timezone=True)
NOW = text("clock_timestamp()")


def _id(name: str = "id") -> Column[object]:
    return Column(name, UUID, primary_key=True)


def _tenant(*, references: bool = True) -> Column[object]:
    # Tables that grow with jobs carry no foreign keys (see migration 0001).
    return Column("tenant_id", UUID, *([ForeignKey("tenants.id")] if references else []), nullable=False)


def _created() -> Column[object]:
    return Column("created_at", AT, nullable=False, server_default=NOW)


def _count(name: str, kind: type[Integer] = Integer) -> Column[object]:
    return Column(name, kind, nullable=False, server_default=text("0"))


tenants = Table(
    "tenants",
    metadata,
    _id(),
    Column("name", Text, nullable=False, unique=True),
    Column("weight", Double, nullable=False, server_default=text("1")),
    _created(),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    _tenant(),
    Column("secret_sha256", LargeBinary, nullable=False),
    _created(),
    Column("expires_at", AT),
    Column("revoked_at", AT),
    Index("api_keys_tenant_id", "tenant_id"),
)

adapters = Table(
    "adapters",
    metadata,
    _id(),
    _tenant(),
    Column("name", Text, nullable=False),
    _created(),
    Column("deleted_at", AT),
    UniqueConstraint("tenant_id", "name"),
)

adapter_revisions = Table(
    "adapter_revisions",
    metadata,
    _id(),
    _tenant(),
    Column("adapter_id", UUID, ForeignKey("adapters.id"), nullable=False),
    Column("digest", Text, nullable=False),
    Column("max_rank", Integer, nullable=False),
    Column("num_tiles", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    _created(),
    Column("uploaded_at", AT, nullable=False, server_default=NOW),
    Column("quarantined_at", AT),
    UniqueConstraint("adapter_id", "digest"),
    Index("adapter_revisions_tenant_id", "tenant_id"),
)

batches = Table(
    "batches",
    metadata,
    _id(),
    _tenant(),
    Column("pool", Text, nullable=False),
    Column("name", Text),
    Column("priority", SmallInteger, nullable=False, server_default=text("1")),
    Column("deadline_at", AT),
    _created(),
    Column("paused_at", AT),
    Column("cancel_requested_at", AT),
    Column("finished_at", AT),
    Column("total", Integer, nullable=False),
    _count("succeeded"),
    _count("failed"),
    _count("cancelled"),
    _count("expired"),
    _count("prompt_tokens", BigInteger),
    _count("completion_tokens", BigInteger),
    _count("last_seq", BigInteger),
    CheckConstraint("succeeded + failed + cancelled + expired <= total"),
    Index("batches_tenant_id_id", "tenant_id", "id"),
)

sweeps = Table(
    "sweeps",
    metadata,
    Column("id", UUID, ForeignKey("batches.id"), primary_key=True),
    _tenant(),
    Column("name", Text, nullable=False),
    Column("definition_sha256", LargeBinary, nullable=False),
    Column("sampling", JSONB, nullable=False),
    Column("seeds", ARRAY(BigInteger), nullable=False),
    Column("num_prompts", Integer, nullable=False),
    Column("num_columns", Integer, nullable=False),
    _count("num_expanded"),
    _count("next_prompt_idx"),
    _count("next_num_expanded"),
    Column("expand_due_at", AT),
    _created(),
    UniqueConstraint("tenant_id", "name"),
    Index("sweeps_expand_due_at", "expand_due_at", postgresql_where=text("expand_due_at IS NOT NULL")),
)

sweep_prompts = Table(
    "sweep_prompts",
    metadata,
    Column("sweep_id", UUID, ForeignKey("sweeps.id"), primary_key=True),
    Column("prompt_idx", Integer, primary_key=True),
    _tenant(references=False),
    Column("custom_id", Text),
    Column("prompt", Text),
    Column("prompt_token_ids", ARRAY(Integer)),
    Column("expected", Text),
    Column("only_adapter", Text),
)

sweep_columns = Table(
    "sweep_columns",
    metadata,
    Column("sweep_id", UUID, ForeignKey("sweeps.id"), primary_key=True),
    Column("column_idx", Integer, primary_key=True),
    _tenant(references=False),
    Column("adapter", Text),
    Column("revision_id", UUID, ForeignKey("adapter_revisions.id")),
)

jobs = Table(
    "jobs",
    metadata,
    _id(),
    _tenant(references=False),
    Column("batch_id", UUID, nullable=False),
    Column("pool", Text, nullable=False),
    Column("revision_id", UUID),
    Column("lane", UUID, Computed("COALESCE(revision_id, tenant_id)", persisted=True)),
    Column("state", Text, nullable=False, server_default=text("'queued'")),
    Column("is_held", Boolean, nullable=False, server_default=text("false")),
    Column("is_cancel_requested", Boolean, nullable=False, server_default=text("false")),
    Column("priority", SmallInteger, nullable=False),
    Column("est_tokens", Integer, nullable=False),
    Column("worker_id", UUID),
    _count("attempt"),
    _count("crashes", SmallInteger),
    Column("step_limit", Integer),
    Column("deadline_at", AT),
    _created(),
    Column("leased_at", AT),
    Column("finished_at", AT),
    Index(
        "jobs_queue",
        "pool",
        "lane",
        text("priority DESC"),
        "id",
        postgresql_where=text("state = 'queued' AND NOT is_held"),
    ),
    Index("jobs_leased", "worker_id", postgresql_where=text("state = 'leased'")),
    Index("jobs_deadline", "deadline_at", postgresql_where=text("state = 'queued' AND deadline_at IS NOT NULL")),
)

job_inputs = Table(
    "job_inputs",
    metadata,
    _id("job_id"),
    _tenant(references=False),
    Column("batch_id", UUID, nullable=False),
    Column("custom_id", Text),
    Column("adapter", Text),
    Column("prompt", Text),
    Column("prompt_token_ids", ARRAY(Integer)),
    Column("prompt_idx", Integer),
    Column("column_idx", Integer),
    Column("seed", BigInteger, nullable=False),
    Column("sampling", JSONB),
    Column("retry_of", UUID),
    Index("job_inputs_batch_id", "batch_id", "job_id"),
)

job_results = Table(
    "job_results",
    metadata,
    _id("job_id"),
    _tenant(references=False),
    Column("batch_id", UUID, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("text", Text),
    Column("token_ids", ARRAY(Integer)),
    Column("logprobs", ARRAY(REAL)),
    Column("finish_reason", Text),
    Column("error_code", Text),
    Column("error_message", Text),
    _count("prompt_tokens"),
    _count("completion_tokens"),
    _count("attempt"),
    Column("worker_id", UUID),
    Index("job_results_batch_id_seq", "batch_id", "seq", unique=True),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _id("job_id"),
    _tenant(references=False),
    Column("token_ids", ARRAY(Integer), nullable=False),
    Column("logprobs", ARRAY(REAL), nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant_id", UUID, ForeignKey("tenants.id"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_sha256", LargeBinary, nullable=False),
    Column("resource_id", UUID, nullable=False),
    _created(),
    Index("idempotency_keys_created_at", "created_at"),
)

demand = Table(
    "demand",
    metadata,
    Column("pool", Text, primary_key=True),
    Column("lane", UUID, primary_key=True),
    Column("priority", SmallInteger, primary_key=True, autoincrement=False),
    _tenant(references=False),
    Column("revision_id", UUID),
    Column("num_queued", Integer, nullable=False),
)

tenant_counters = Table(
    "tenant_counters",
    metadata,
    Column("pool", Text, primary_key=True),
    Column("tenant_id", UUID, ForeignKey("tenants.id"), primary_key=True),
    Column("service", Double, nullable=False, server_default=text("0")),
    Column("is_backlogged", Boolean, nullable=False, server_default=text("false")),
)

crashes = Table(
    "crashes",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    _tenant(references=False),
    Column("job_id", UUID, nullable=False),
    Column("revision_id", UUID),
    Column("worker_id", UUID, nullable=False),
    Column("death_id", UUID, nullable=False),
    Column("num_suspects", Integer, nullable=False),
    _created(),
    Index("crashes_job_id_death_id", "job_id", "death_id", unique=True),
    Index("crashes_revision_id", "revision_id"),
)

workers = Table(
    "workers",
    metadata,
    _id(),
    Column("pool", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("desired_state", Text, nullable=False),
    Column("lease_until", AT, nullable=False),
    Column("started_at", AT, nullable=False, server_default=NOW),
    Column("changed_at", AT, nullable=False, server_default=NOW),
    Column("max_num_seqs", Integer, nullable=False),
    _count("num_pages"),
    _count("page_size"),
    _count("num_tiles"),
    Column("resident", ARRAY(UUID), nullable=False, server_default=text("'{}'")),
    Column("stats", JSONB, nullable=False, server_default=text("'{}'")),
    Index("workers_pool", "pool", postgresql_where=text("state <> 'gone'")),
)

leaders = Table(
    "leaders",
    metadata,
    Column("pool", Text, primary_key=True),
    Column("holder", UUID, nullable=False),
    Column("term", BigInteger, nullable=False),
    Column("until", AT, nullable=False),
)
