"""Jobs: the part that changes, the part that never does, the result, and what is kept between attempts."""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    Computed,
    Date,
    Identity,
    Index,
    Integer,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, REAL, UUID

from medley.db.models.base import AT, NOW, count, created_at, id_column, metadata, tenant_id

# As PostgreSQL writes it; `demand.lane_of` is the same in Python.
_LANE = (
    "CASE WHEN is_shared"
    " THEN (encode(SUBSTRING(sha256((uuid_send(tenant_id) || uuid_send(revision_id))) FROM 1 FOR 16),"
    " 'hex'::text))::uuid"
    " ELSE COALESCE(revision_id, tenant_id) END"
)
jobs = Table(
    "jobs",
    metadata,
    id_column(),
    tenant_id(references=False),
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
    count("attempt"),
    count("crashes", SmallInteger),
    Column("step_limit", Integer),
    Column("deadline_at", AT),
    created_at(),
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
    Index("jobs_leased", "worker_id", "leased_at", postgresql_where=text("state = 'leased'")),
    Index("jobs_deadline", "deadline_at", postgresql_where=text("state = 'queued' AND deadline_at IS NOT NULL")),
)

job_inputs = Table(
    "job_inputs",
    metadata,
    id_column("job_id"),
    tenant_id(references=False),
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
    id_column("job_id"),
    tenant_id(references=False),
    Column("batch_id", UUID, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("text", Text),
    Column("token_ids", ARRAY(Integer)),
    Column("logprobs", ARRAY(REAL)),
    Column("finish_reason", Text),
    Column("error_code", Text),
    Column("error_message", Text),
    count("prompt_tokens"),
    count("completion_tokens"),
    count("attempt"),
    Column("worker_id", UUID),
    Column("top_token_ids", ARRAY(Integer)),
    Column("top_logprobs", ARRAY(REAL)),
    Column("prompt_token_ids", ARRAY(Integer)),
    Column("prompt_logprobs", ARRAY(REAL)),
    Column("prompt_top_token_ids", ARRAY(Integer)),
    Column("prompt_top_logprobs", ARRAY(REAL)),
    Column("is_greedy", Boolean),
    Column("retried_by", UUID),
    Index("job_results_batch_id_seq", "batch_id", "seq"),
    Index("job_results_unsuccessful", "batch_id", "seq", postgresql_where=text("state <> 'succeeded'")),
    postgresql_partition_by="RANGE (job_id)",
)

checkpoints = Table(
    "checkpoints",
    metadata,
    id_column("job_id"),
    tenant_id(references=False),
    Column("token_ids", ARRAY(Integer), nullable=False),
    Column("logprobs", ARRAY(REAL), nullable=False),
    Column("details", JSONB),
)

crashes = Table(
    "crashes",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    tenant_id(references=False),
    Column("job_id", UUID, nullable=False),
    Column("revision_id", UUID),
    Column("worker_id", UUID, nullable=False),
    Column("death_id", UUID, nullable=False),
    Column("num_suspects", Integer, nullable=False),
    created_at(),
    Index("crashes_job_id_death_id", "job_id", "death_id", unique=True),
    Index("crashes_revision_id", "revision_id"),
)

expired_jobs = Table(
    "expired_jobs",
    metadata,
    Column("day", Date, primary_key=True),
    Column("num_jobs", BigInteger, nullable=False),
    Column("since", AT, nullable=False, server_default=NOW),
)
