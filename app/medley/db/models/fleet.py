"""The fleet: what waits for it and what it has done for whom (as sums and changes), its workers, what operators did to
them, its leaders.
"""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Identity,
    Index,
    Integer,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB, UUID

from medley.db.models.base import AT, NOW, count, id_column, metadata, tenant_id

_XACT = text("((pg_current_xact_id())::text)::bigint")

demand_sums = Table(
    "demand_sums",
    metadata,
    Column("pool", Text, primary_key=True),
    Column("lane", UUID, primary_key=True),
    Column("priority", SmallInteger, primary_key=True, autoincrement=False),
    tenant_id(references=False),
    Column("revision_id", UUID),
    Column("num_queued", Integer, nullable=False),
)

demand_changes = Table(
    "demand_changes",
    metadata,
    Column("xact", BigInteger, nullable=False, server_default=_XACT),
    Column("pool", Text, nullable=False),
    Column("lane", UUID, nullable=False),
    Column("priority", SmallInteger, nullable=False),
    tenant_id(references=False),
    Column("revision_id", UUID),
    Column("num_queued", Integer, nullable=False),
    Column("first_id", UUID),
    Index("demand_changes_xact", "pool", "xact"),
)

counter_sums = Table(
    "counter_sums",
    metadata,
    Column("pool", Text, primary_key=True),
    Column("tenant_id", UUID, ForeignKey("tenants.id"), primary_key=True),
    Column("service", Double, nullable=False, server_default=text("0")),
    Column("is_backlogged", Boolean, nullable=False, server_default=text("false")),
)

counter_changes = Table(
    "counter_changes",
    metadata,
    Column("xact", BigInteger, nullable=False, server_default=_XACT),
    Column("pool", Text, nullable=False),
    tenant_id(references=False),
    Column("service", Double, nullable=False),
    Index("counter_changes_xact", "pool", "xact"),
)

workers = Table(
    "workers",
    metadata,
    id_column(),
    Column("pool", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("desired_state", Text, nullable=False),
    Column("lease_until", AT, nullable=False),
    Column("started_at", AT, nullable=False, server_default=NOW),
    Column("changed_at", AT, nullable=False, server_default=NOW),
    Column("max_num_seqs", Integer, nullable=False),
    count("num_pages"),
    count("page_size"),
    count("num_tiles"),
    Column("resident", ARRAY(UUID), nullable=False, server_default=text("'{}'")),
    Column("stats", JSONB, nullable=False, server_default=text("'{}'")),
    Column("version", Text, nullable=False, server_default=text("''")),
    Column("held_state", Text),
    Column("held_by", Text),
    Column("held_at", AT),
    Index("workers_living", "pool", "lease_until", postgresql_where=text("state <> 'gone'")),
    Index("workers_gone", "pool", postgresql_where=text("state = 'gone'")),
)

worker_batches = Table(
    "worker_batches",
    metadata,
    Column("worker_id", UUID, ForeignKey("workers.id", ondelete="CASCADE"), primary_key=True),
    Column("batch", JSONB, nullable=False),
    Column("at", AT, nullable=False, server_default=NOW),
)

fleet_log = Table(
    "fleet_log",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("pool", Text, nullable=False),
    Column("worker_id", UUID, nullable=False),
    Column("action", Text, nullable=False),
    Column("operator", Text, nullable=False),
    Column("details", JSONB, nullable=False, server_default=text("'{}'")),
    Column("at", AT, nullable=False, server_default=NOW),
)

leaders = Table(
    "leaders",
    metadata,
    Column("pool", Text, primary_key=True),
    Column("holder", UUID, nullable=False),
    Column("term", BigInteger, nullable=False),
    Column("until", AT, nullable=False),
)
