"""What batches say of themselves and can be told: counts by lane, usage, retries, sweeps in parts, webhooks.

Revision ID: 0007
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TENANT_TABLES = ("batch_lanes", "batch_failures", "usage", "sweep_parts", "webhooks", "webhook_deliveries")
# What an extension changes; progress is the expanders' alone.
SWEEP_COLUMNS = "past_definitions, definition_sha256, num_prompts, num_columns, seeds, expand_due_at"

TABLES = """
ALTER TABLE batches
    ADD COLUMN is_single boolean NOT NULL DEFAULT false,    -- a job by itself: its end is no event
    ADD COLUMN retried integer NOT NULL DEFAULT 0,      -- results that a later attempt supersedes
    -- Ends by workers, each weighed by exp(-age / minute), as they stood at recent_at; counted since recent_since.
    ADD COLUMN recent_num double precision NOT NULL DEFAULT 0,
    ADD COLUMN recent_at timestamptz,
    ADD COLUMN recent_since timestamptz;

ALTER TABLE job_results ADD COLUMN retried_by uuid;     -- the job that supersedes it
-- What a retry looks through, and all that there is to find where nothing failed.
CREATE INDEX job_results_unsuccessful ON job_results (batch_id, seq) WHERE state <> 'succeeded';

-- A batch's counts by lane, kept in the statements that keep the batch's own. Written under the batch's lock.
CREATE TABLE batch_lanes (
    batch_id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    revision_id uuid,                       -- null: the base
    adapter text,                           -- as it was first named
    total integer NOT NULL DEFAULT 0,
    succeeded integer NOT NULL DEFAULT 0,
    failed integer NOT NULL DEFAULT 0,
    cancelled integer NOT NULL DEFAULT 0,
    expired integer NOT NULL DEFAULT 0,
    prompt_tokens bigint NOT NULL DEFAULT 0,
    completion_tokens bigint NOT NULL DEFAULT 0,
    recent_num double precision NOT NULL DEFAULT 0,     -- as in batches
    recent_at timestamptz,
    recent_since timestamptz,
    UNIQUE NULLS NOT DISTINCT (batch_id, revision_id)
) WITH (fillfactor = 50);

-- Failures that no later attempt supersedes, by lane and code.
CREATE TABLE batch_failures (
    batch_id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    revision_id uuid,
    code text NOT NULL,
    num_jobs integer NOT NULL,
    UNIQUE NULLS NOT DISTINCT (batch_id, revision_id, code)
) WITH (fillfactor = 50);

-- What workers did for a tenant, by the day (UTC) on which jobs ended and by revision, whoever's that is.
CREATE TABLE usage (
    tenant_id uuid NOT NULL REFERENCES tenants (id),
    day date NOT NULL,
    revision_id uuid,                       -- null: the base
    num_jobs bigint NOT NULL,
    prompt_tokens bigint NOT NULL,
    completion_tokens bigint NOT NULL,
    UNIQUE NULLS NOT DISTINCT (tenant_id, day, revision_id)
) WITH (fillfactor = 50);

-- A sweep grows by parts: this is its size with each. A part's cells are those within its size and outside the size
-- of the part before.
CREATE TABLE sweep_parts (
    sweep_id uuid NOT NULL REFERENCES sweeps (id),
    part_idx integer NOT NULL,
    tenant_id uuid NOT NULL,
    num_prompts integer NOT NULL,
    num_columns integer NOT NULL,
    num_seeds integer NOT NULL,
    PRIMARY KEY (sweep_id, part_idx)
);
ALTER TABLE sweeps
    ADD COLUMN next_part_idx integer NOT NULL DEFAULT 0,    -- the part whose cells become jobs
    ADD COLUMN past_definitions bytea[] NOT NULL DEFAULT '{}';  -- digests of what it was declared as before

CREATE TABLE webhooks (
    id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL REFERENCES tenants (id),
    url text NOT NULL,
    events text[] NOT NULL,
    description text,
    batch_id uuid,                          -- of this batch alone; null: of all
    failed_jobs integer CHECK (failed_jobs > 0),    -- failures of a batch that make the event batch.failing
    secret bytea NOT NULL,
    previous_secret bytea,                  -- signs too, until previous_until
    previous_until timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    disabled_at timestamptz,
    disabled_reason text,
    CHECK ((disabled_at IS NULL) = (disabled_reason IS NULL))
);
CREATE INDEX webhooks_tenant_id ON webhooks (tenant_id) WHERE batch_id IS NULL;
CREATE INDEX webhooks_batch_id ON webhooks (batch_id) WHERE batch_id IS NOT NULL;

-- One event on its way to one endpoint. Its id is the same in every attempt.
CREATE TABLE webhook_deliveries (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id uuid NOT NULL,
    webhook_id uuid NOT NULL,               -- no foreign key: no end of a job may fail because an endpoint is deleted
    event text NOT NULL,
    payload text NOT NULL,                  -- JSON, as it is signed and sent
    state text NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'delivered', 'failed')),
    attempt integer NOT NULL DEFAULT 0,
    due_at timestamptz DEFAULT clock_timestamp(),   -- of the next attempt; null once it has ended
    rung_at timestamptz,                    -- when a message was last sent for it
    leased_until timestamptz,               -- an attempt runs
    status integer,                         -- HTTP's, of the last attempt
    error text,                             -- why the last attempt failed
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz,
    CHECK ((state = 'pending') = (due_at IS NOT NULL))
);
CREATE INDEX webhook_deliveries_due_at ON webhook_deliveries (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX webhook_deliveries_waiting ON webhook_deliveries (webhook_id, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX webhook_deliveries_webhook_id ON webhook_deliveries (webhook_id, created_at);
CREATE INDEX webhook_deliveries_tenant_id ON webhook_deliveries (tenant_id, created_at);
"""

# What there was before it was counted by lane. Batches of millions of jobs take minutes, once.
FILL = """
INSERT INTO batch_lanes (batch_id, tenant_id, revision_id, adapter, total, succeeded, failed, cancelled, expired,
    prompt_tokens, completion_tokens)
SELECT j.batch_id, j.tenant_id, j.revision_id, min(i.adapter), count(*),
    count(*) FILTER (WHERE j.state = 'succeeded'), count(*) FILTER (WHERE j.state = 'failed'),
    count(*) FILTER (WHERE j.state = 'cancelled'), count(*) FILTER (WHERE j.state = 'expired'),
    coalesce(sum(r.prompt_tokens), 0), coalesce(sum(r.completion_tokens), 0)
FROM jobs j JOIN job_inputs i ON i.job_id = j.id LEFT JOIN job_results r ON r.job_id = j.id
GROUP BY j.batch_id, j.tenant_id, j.revision_id;

INSERT INTO batch_failures (batch_id, tenant_id, revision_id, code, num_jobs)
SELECT j.batch_id, j.tenant_id, j.revision_id, coalesce(r.error_code, 'unknown'), count(*)
FROM jobs j JOIN job_results r ON r.job_id = j.id WHERE r.state = 'failed' GROUP BY 1, 2, 3, 4;

INSERT INTO usage (tenant_id, day, revision_id, num_jobs, prompt_tokens, completion_tokens)
SELECT j.tenant_id, (j.finished_at AT TIME ZONE 'UTC')::date, j.revision_id, count(*), sum(r.prompt_tokens),
    sum(r.completion_tokens)
FROM jobs j JOIN job_results r ON r.job_id = j.id WHERE r.worker_id IS NOT NULL GROUP BY 1, 2, 3;

INSERT INTO sweep_parts (sweep_id, part_idx, tenant_id, num_prompts, num_columns, num_seeds)
SELECT id, 0, tenant_id, num_prompts, num_columns, cardinality(seeds) FROM sweeps;

UPDATE sweeps SET next_part_idx = 1, next_prompt_idx = 0, next_num_expanded = 0 WHERE expand_due_at IS NULL;

-- Cells of sweeps that have not become jobs yet count in their columns' totals.
INSERT INTO batch_lanes AS l (batch_id, tenant_id, revision_id, adapter, total)
SELECT c.sweep_id, c.tenant_id, c.revision_id, c.adapter, count(*) * cardinality(s.seeds)
FROM sweeps s JOIN sweep_columns c ON c.sweep_id = s.id JOIN sweep_prompts p ON p.sweep_id = s.id
    AND (p.only_adapter IS NULL OR c.adapter IS NULL OR c.adapter = p.only_adapter)
GROUP BY c.sweep_id, c.column_idx, s.seeds
ON CONFLICT (batch_id, revision_id) DO UPDATE SET total = excluded.total;
"""

MINE = "tenant_id = (SELECT medley_tenant())"
# What became of an event is kept as long as the batches that events are about.
KEPT_DELIVERY = f"{MINE} AND created_at > (SELECT medley_kept_since())"


def upgrade() -> None:
    op.execute(TABLES)
    for table in TENANT_TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        kept = KEPT_DELIVERY if table == "webhook_deliveries" else MINE
        op.execute(f"CREATE POLICY tenant ON {table} TO medley_api USING ({kept}) WITH CHECK ({MINE})")
        op.execute(f"CREATE POLICY work ON {table} TO medley_work USING (true) WITH CHECK (true)")
        op.execute(f"CREATE POLICY owner ON {table} TO medley_owner USING (true) WITH CHECK (true)")
    op.execute(FILL)
    _grant()


def _grant() -> None:
    tables = ", ".join(TENANT_TABLES)
    op.execute(f"GRANT SELECT ON {tables} TO medley_api")
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO medley_work")
    op.execute("GRANT INSERT ON batch_lanes, batch_failures, sweep_parts, webhooks, webhook_deliveries TO medley_api")
    op.execute("GRANT UPDATE ON batch_lanes, batch_failures, webhooks TO medley_api")
    op.execute(f"GRANT UPDATE ({SWEEP_COLUMNS}) ON sweeps TO medley_api")
    op.execute("GRANT UPDATE (due_at, attempt) ON webhook_deliveries TO medley_api")
    op.execute("GRANT DELETE ON webhooks, webhook_deliveries TO medley_api")
    # A retry supersedes results; a batch's priority and deadline are those of its jobs.
    op.execute("GRANT UPDATE (retried_by) ON job_results TO medley_api")
    op.execute("GRANT UPDATE (priority, deadline_at) ON jobs TO medley_api")


def downgrade() -> None:
    op.execute("REVOKE UPDATE (priority, deadline_at) ON jobs FROM medley_api")
    op.execute(f"REVOKE UPDATE ({SWEEP_COLUMNS.replace('past_definitions, ', '')}) ON sweeps FROM medley_api")
    op.execute(f"DROP TABLE {', '.join(reversed(TENANT_TABLES))}")
    op.execute("ALTER TABLE sweeps DROP COLUMN next_part_idx, DROP COLUMN past_definitions")
    op.execute("DROP INDEX job_results_unsuccessful")
    op.execute("ALTER TABLE job_results DROP COLUMN retried_by")
    op.execute(
        "ALTER TABLE batches DROP COLUMN is_single, DROP COLUMN retried, DROP COLUMN recent_num,"
        " DROP COLUMN recent_at, DROP COLUMN recent_since"
    )
