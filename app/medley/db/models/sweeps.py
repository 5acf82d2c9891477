"""Sweeps: what they are made of, and how far they have been expanded."""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

from medley.db.models.base import AT, count, created_at, metadata, tenant_id

sweeps = Table(
    "sweeps",
    metadata,
    Column("id", UUID, ForeignKey("batches.id"), primary_key=True),
    tenant_id(),
    Column("name", Text, nullable=False),
    Column("definition_sha256", LargeBinary, nullable=False),
    Column("sampling", JSONB, nullable=False),
    Column("seeds", ARRAY(BigInteger), nullable=False),
    Column("num_prompts", Integer, nullable=False),
    Column("num_columns", Integer, nullable=False),
    count("num_expanded"),
    count("next_prompt_idx"),
    count("next_num_expanded"),
    Column("expand_due_at", AT),
    created_at(),
    count("next_part_idx"),
    Column("past_definitions", ARRAY(LargeBinary), nullable=False, server_default=text("'{}'")),
    UniqueConstraint("tenant_id", "name"),
    Index("sweeps_expand_due_at", "expand_due_at", postgresql_where=text("expand_due_at IS NOT NULL")),
)

sweep_parts = Table(
    "sweep_parts",
    metadata,
    Column("sweep_id", UUID, ForeignKey("sweeps.id"), primary_key=True),
    Column("part_idx", Integer, primary_key=True),
    tenant_id(references=False),
    Column("num_prompts", Integer, nullable=False),
    Column("num_columns", Integer, nullable=False),
    Column("num_seeds", Integer, nullable=False),
)

sweep_prompts = Table(
    "sweep_prompts",
    metadata,
    Column("sweep_id", UUID, ForeignKey("sweeps.id"), primary_key=True),
    Column("prompt_idx", Integer, primary_key=True),
    tenant_id(references=False),
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
    tenant_id(references=False),
    Column("adapter", Text),
    Column("revision_id", UUID),
)
