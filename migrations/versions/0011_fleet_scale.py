"""What a large fleet's dispatcher reads beside an old snapshot, at a cost that does not grow with the snapshot's age.

A version of a row that died stays, in the table and in its indexes, for as long as any session's snapshot is older,
and whoever looks for the row's newest version passes all of them. So what changes with each job is written as rows
that are only inserted, found from the last ones seen on, and folded into sums now and then; and indexes begin with
what grows (when a job was leased, until when a worker lives), so that a look begins behind what has died.

Revision ID: 0011
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

INDEXES = """
DROP INDEX jobs_leased;
CREATE INDEX jobs_leased ON jobs (worker_id, leased_at) WHERE state = 'leased';
DROP INDEX workers_pool;
CREATE INDEX workers_living ON workers (pool, lease_until) WHERE state <> 'gone';
CREATE INDEX workers_gone ON workers (pool) WHERE state = 'gone';
"""

# What is summed up is what the old tables held: they become the sums.
TABLES = """
ALTER TABLE demand RENAME TO demand_sums;
ALTER TABLE demand_sums RENAME CONSTRAINT demand_pkey TO demand_sums_pkey;
ALTER TABLE tenant_counters RENAME TO counter_sums;
ALTER TABLE counter_sums RENAME CONSTRAINT tenant_counters_pkey TO counter_sums_pkey;
ALTER TABLE counter_sums RENAME CONSTRAINT tenant_counters_tenant_id_fkey TO counter_sums_tenant_id_fkey;

-- `xact`: the transaction that wrote the row, by which a reader tells what it has seen from what it has not.
CREATE TABLE demand_changes (
    xact bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    pool text NOT NULL,
    lane uuid NOT NULL,
    priority smallint NOT NULL,
    tenant_id uuid NOT NULL,
    revision_id uuid,
    num_queued integer NOT NULL,
    first_id uuid                           -- no job that this adds has a lower id; null: it adds none
);
CREATE INDEX demand_changes_xact ON demand_changes (pool, xact);
CREATE TABLE counter_changes (
    xact bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
    pool text NOT NULL,
    tenant_id uuid NOT NULL,
    service double precision NOT NULL
);
CREATE INDEX counter_changes_xact ON counter_changes (pool, xact);
"""

VIEWS = """
-- Jobs that wait and are not held, by lane and priority.
CREATE VIEW demand WITH (security_invoker = true) AS
SELECT pool, lane, priority, tenant_id, revision_id, sum(num_queued)::integer AS num_queued FROM (
    SELECT pool, lane, priority, tenant_id, revision_id, num_queued FROM demand_sums
    UNION ALL SELECT pool, lane, priority, tenant_id, revision_id, num_queued FROM demand_changes) d
GROUP BY pool, lane, priority, tenant_id, revision_id;
-- Service received, in tokens over weight: the least is served first.
CREATE VIEW tenant_counters WITH (security_invoker = true) AS
SELECT pool, tenant_id, sum(service) AS service, bool_or(is_backlogged) AS is_backlogged FROM (
    SELECT pool, tenant_id, service, is_backlogged FROM counter_sums
    UNION ALL SELECT pool, tenant_id, service, false FROM counter_changes) c
GROUP BY pool, tenant_id;
"""
CHANGES = ("demand_changes", "counter_changes")


def upgrade() -> None:
    op.execute(INDEXES)
    op.execute(TABLES)
    op.execute(VIEWS)
    mine = "tenant_id = (SELECT medley_tenant())"
    for table in CHANGES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY tenant ON {table} TO medley_api USING ({mine}) WITH CHECK ({mine})")
        op.execute(f"CREATE POLICY work ON {table} TO medley_work USING (true) WITH CHECK (true)")
        op.execute(f"CREATE POLICY owner ON {table} TO medley_owner USING (true) WITH CHECK (true)")
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO medley_work")
        op.execute(f"GRANT SELECT ON {table} TO medley_api")
    op.execute("GRANT SELECT ON demand, tenant_counters TO medley_api, medley_work")
    # Whoever makes and ends jobs says so; only the leader sums up.
    op.execute("GRANT INSERT ON demand_changes TO medley_api")
    op.execute("REVOKE INSERT ON demand_sums FROM medley_api")
    op.execute("REVOKE UPDATE (num_queued) ON demand_sums FROM medley_api")


def downgrade() -> None:
    op.execute(
        "INSERT INTO demand_sums AS s SELECT pool, lane, priority, tenant_id, revision_id, sum(num_queued)"
        " FROM demand_changes GROUP BY pool, lane, priority, tenant_id, revision_id"
        " ON CONFLICT (pool, lane, priority) DO UPDATE SET num_queued = s.num_queued + excluded.num_queued"
    )
    op.execute(
        "INSERT INTO counter_sums AS s (pool, tenant_id, service) SELECT c.pool, c.tenant_id, sum(c.service)"
        " FROM counter_changes c JOIN tenants t ON t.id = c.tenant_id GROUP BY c.pool, c.tenant_id"
        " ON CONFLICT (pool, tenant_id) DO UPDATE SET service = s.service + excluded.service"
    )
    op.execute("DROP VIEW demand, tenant_counters")
    op.execute("DROP TABLE demand_changes, counter_changes")
    op.execute("ALTER TABLE demand_sums RENAME TO demand")
    op.execute("ALTER TABLE demand RENAME CONSTRAINT demand_sums_pkey TO demand_pkey")
    op.execute("ALTER TABLE counter_sums RENAME TO tenant_counters")
    op.execute("ALTER TABLE tenant_counters RENAME CONSTRAINT counter_sums_pkey TO tenant_counters_pkey")
    op.execute(
        "ALTER TABLE tenant_counters RENAME CONSTRAINT counter_sums_tenant_id_fkey TO tenant_counters_tenant_id_fkey"
    )
    op.execute("GRANT INSERT, UPDATE (num_queued) ON demand TO medley_api")
    op.execute("DROP INDEX workers_gone, workers_living")
    op.execute("CREATE INDEX workers_pool ON workers (pool) WHERE state <> 'gone'")
    op.execute("DROP INDEX jobs_leased")
    op.execute("CREATE INDEX jobs_leased ON jobs (worker_id) WHERE state = 'leased'")
