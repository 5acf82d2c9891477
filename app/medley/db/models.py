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
    Date,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
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
    Column("retention_days", Integer, nullable=False, server_default=text("30")),
    Column("delete_requested_at", AT),
    Column("delete_due_at", AT),
    UniqueConstraint("id", "name"),
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

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    _tenant(references=False),
    Column("key_id", Text),
    Column("action", Text, nullable=False),
    Column("object", Text, nullable=False),
    Column("details", JSONB, nullable=False, server_default=text("'{}'")),
    Column("request_id", Text),
    Column("client_address", Text),
    Column("at", AT, nullable=False, server_default=NOW),
    Index("audit_log_tenant_id_id", "tenant_id", "id"),
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
    UniqueConstraint("id", "tenant_id"),
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
    Column("forgotten_at", AT),
    UniqueConstraint("adapter_id", "digest"),
    UniqueConstraint("id", "adapter_id"),
    Index("adapter_revisions_tenant_id", "tenant_id"),
    Index("adapter_revisions_digest", "digest"),
)

adapter_grants = Table(
    "adapter_grants",
    metadata,
    _id(),
    Column("tenant_id", UUID, ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("owner", Text, nullable=False),
    Column("adapter_id", UUID, nullable=False),
    Column("revision_id", UUID),
    Column("grantee", Text, ForeignKey("tenants.name", onupdate="CASCADE", ondelete="CASCADE"), nullable=False),
    _created(),
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
    _count("queued_bytes", BigInteger),
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

batch_forecasts = Table(
    "batch_forecasts",
    metadata,
    _id("batch_id"),
    _tenant(references=False),
    Column("ends_at", AT, nullable=False),
    Column("is_late", Boolean, nullable=False),
    Column("made_at", AT, nullable=False, server_default=NOW),
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
    Column("continuation", Text),
    Column("continuation_token_ids", ARRAY(Integer)),
)

sweep_columns = Table(
    "sweep_columns",
    metadata,
    Column("sweep_id", UUID, ForeignKey("sweeps.id"), primary_key=True),
    Column("column_idx", Integer, primary_key=True),
    _tenant(references=False),
    Column("adapter", Text),
    Column("revision_id", UUID),
)

# As PostgreSQL writes it; `demand.lane_of` is the same in Python.
_LANE = (
    "CASE WHEN is_shared"
    " THEN (encode(SUBSTRING(sha256((uuid_send(tenant_id) || uuid_send(revision_id))) FROM 1 FOR 16),"
    " 'hex'::text))::uuid"
    " ELSE COALESCE(revision_id, tenant_id) END"
)

files = Table(
    "files",
    metadata,
    _id(),
    _tenant(),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("object_key", Text, nullable=False, unique=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", LargeBinary, nullable=False),
    _created(),
    Column("expires_at", AT, nullable=False),
    Column("stored_at", AT),
    Column("deleted_at", AT),
    Index("files_tenant_id_id", "tenant_id", "id"),
)

openai_batches = Table(
    "openai_batches",
    metadata,
    Column("id", UUID, ForeignKey("batches.id"), primary_key=True),
    _tenant(),
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", UUID, nullable=False),
    Column("completion_window", Text, nullable=False),
    Column("metadata", JSONB),
    Column("output_expires_after_s", Integer),
    Column("state", Text, nullable=False, server_default=text("'validating'")),
    Column("due_at", AT, server_default=NOW),
    Column("model", Text),
    _count("num_requests"),
    _count("num_jobs"),
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
    Index("openai_batches_tenant_id_id", "tenant_id", "id"),
    Index("openai_batches_due_at", "due_at", postgresql_where=text("due_at IS NOT NULL")),
    Index("openai_batches_running", "id", postgresql_where=text("state = 'in_progress' AND due_at IS NULL")),
)

openai_batch_models = Table(
    "openai_batch_models",
    metadata,
    Column("batch_id", UUID, ForeignKey("openai_batches.id"), primary_key=True),
    Column("model", Text, primary_key=True),
    _tenant(references=False),
    Column("revision_id", UUID),
)

jobs = Table(
    "jobs",
    metadata,
    _id(),
    _tenant(references=False),
    Column("batch_id", UUID, nullable=False),
    Column("pool", Text, nullable=False),
    Column("revision_id", UUID),
    Column("is_shared", Boolean, nullable=False, server_default=text("false")),
    Column("lane", UUID, Computed(_LANE, persisted=True)),
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
    Column("continuation", Text),
    Column("continuation_token_ids", ARRAY(Integer)),
    Column("sample_idx", Integer),
    Column("is_templated", Boolean),
    Column("answer", JSONB),
    Index("job_inputs_batch_id", "batch_id", "job_id"),
    postgresql_partition_by="RANGE (job_id)",
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
    Column("top_token_ids", ARRAY(Integer)),
    Column("top_logprobs", ARRAY(REAL)),
    Column("prompt_token_ids", ARRAY(Integer)),
    Column("prompt_logprobs", ARRAY(REAL)),
    Column("prompt_top_token_ids", ARRAY(Integer)),
    Column("prompt_top_logprobs", ARRAY(REAL)),
    Column("is_greedy", Boolean),
    Index("job_results_batch_id_seq", "batch_id", "seq"),
    postgresql_partition_by="RANGE (job_id)",
)

checkpoints = Table(
    "checkpoints",
    metadata,
    _id("job_id"),
    _tenant(references=False),
    Column("token_ids", ARRAY(Integer), nullable=False),
    Column("logprobs", ARRAY(REAL), nullable=False),
    Column("details", JSONB),
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

expired_jobs = Table(
    "expired_jobs",
    metadata,
    Column("day", Date, primary_key=True),
    Column("num_jobs", BigInteger, nullable=False),
    Column("since", AT, nullable=False, server_default=NOW),
)

erasures = Table(
    "erasures",
    metadata,
    _id(),
    Column("name", Text, nullable=False),
    Column("requested_at", AT, nullable=False),
    Column("started_at", AT, nullable=False, server_default=NOW),
    Column("finished_at", AT),
    Column("num_rows", JSONB, nullable=False, server_default=text("'{}'")),
    Column("digests", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    _count("num_revisions"),
    _count("num_shared"),
)
