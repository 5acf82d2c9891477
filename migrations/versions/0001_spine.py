"""The spine: roles, tenants, adapters, jobs, workers, and row-level security on every tenant's table.

Tables that grow with jobs (`jobs`, `job_inputs`, `job_results`, `checkpoints`) carry no foreign keys: each would
cost an index look-up and a share lock a row in the bulk writes, and old parts are to be dropped whole. Their
integrity rests on the statements of `medley.db`, which alone write them.

Revision ID: 0001
"""

from __future__ import annotations

import os

from alembic import op
from sqlalchemy import text

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# A row of these belongs to one tenant. The API's role sees a row only inside a transaction that named the tenant.
TENANT_TABLES = (
    "tenants",
    "api_keys",
    "adapters",
    "adapter_revisions",
    "batches",
    "sweeps",
    "sweep_prompts",
    "sweep_columns",
    "jobs",
    "job_inputs",
    "job_results",
    "checkpoints",
    "idempotency_keys",
    "demand",
    "tenant_counters",
    "crashes",
)

TABLES = """
CREATE TABLE tenants (
    id uuid PRIMARY KEY,
    name text NOT NULL UNIQUE CHECK (name ~ '^[a-z0-9][a-z0-9_-]{0,62}$'),
    weight double precision NOT NULL DEFAULT 1 CHECK (weight > 0),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE api_keys (
    id text PRIMARY KEY,                    -- the public part of the key
    tenant_id uuid NOT NULL REFERENCES tenants (id),
    secret_sha256 bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz,
    revoked_at timestamptz
);
CREATE INDEX api_keys_tenant_id ON api_keys (tenant_id);

CREATE TABLE adapters (
    id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL REFERENCES tenants (id),
    name text NOT NULL CHECK (name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$'),
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    deleted_at timestamptz,
    UNIQUE (tenant_id, name)
);

CREATE TABLE adapter_revisions (
    id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL REFERENCES tenants (id),
    adapter_id uuid NOT NULL REFERENCES adapters (id),
    digest text NOT NULL CHECK (digest ~ '^[0-9a-f]{64}$'),    -- SHA-256 of both files: the store's address
    max_rank integer NOT NULL,
    num_tiles integer NOT NULL,             -- tiles of device memory it takes
    size_bytes bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    uploaded_at timestamptz NOT NULL DEFAULT clock_timestamp(),     -- the last time; the name means the latest
    quarantined_at timestamptz,
    UNIQUE (adapter_id, digest)
);
CREATE INDEX adapter_revisions_tenant_id ON adapter_revisions (tenant_id);

CREATE TABLE batches (
    id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL REFERENCES tenants (id),
    pool text NOT NULL,
    name text,
    priority smallint NOT NULL DEFAULT 1 CHECK (priority BETWEEN 0 AND 2),
    deadline_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    paused_at timestamptz,
    cancel_requested_at timestamptz,
    finished_at timestamptz,
    total integer NOT NULL,
    succeeded integer NOT NULL DEFAULT 0,
    failed integer NOT NULL DEFAULT 0,
    cancelled integer NOT NULL DEFAULT 0,
    expired integer NOT NULL DEFAULT 0,
    prompt_tokens bigint NOT NULL DEFAULT 0,
    completion_tokens bigint NOT NULL DEFAULT 0,
    last_seq bigint NOT NULL DEFAULT 0,     -- the number given to the newest result
    CHECK (succeeded + failed + cancelled + expired <= total)
);
CREATE INDEX batches_tenant_id_id ON batches (tenant_id, id);

-- A sweep is a batch that the service expands: its id is the batch's.
CREATE TABLE sweeps (
    id uuid PRIMARY KEY REFERENCES batches (id),
    tenant_id uuid NOT NULL REFERENCES tenants (id),
    name text NOT NULL,
    definition_sha256 bytea NOT NULL,       -- of prompts, patterns, sampling, seeds: what a resume compares
    sampling jsonb NOT NULL,
    seeds bigint[] NOT NULL,
    num_prompts integer NOT NULL,
    num_columns integer NOT NULL,
    num_expanded integer NOT NULL DEFAULT 0,    -- cells that have become jobs
    next_prompt_idx integer NOT NULL DEFAULT 0, -- the prompt whose cells become jobs next,
    next_num_expanded integer NOT NULL DEFAULT 0,   -- and how many of them have
    expand_due_at timestamptz,              -- when the expansion is rung again; null once it is whole
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (tenant_id, name)
);
CREATE INDEX sweeps_expand_due_at ON sweeps (expand_due_at) WHERE expand_due_at IS NOT NULL;

CREATE TABLE sweep_prompts (
    sweep_id uuid NOT NULL REFERENCES sweeps (id),
    prompt_idx integer NOT NULL,
    tenant_id uuid NOT NULL,
    custom_id text,
    prompt text,
    prompt_token_ids integer[],
    expected text,
    only_adapter text,                      -- the prompt runs on this adapter (and the base) alone; null: on all
    PRIMARY KEY (sweep_id, prompt_idx),
    CHECK ((prompt IS NULL) <> (prompt_token_ids IS NULL))
);

-- One column of the sweep: an adapter revision, or the base.
CREATE TABLE sweep_columns (
    sweep_id uuid NOT NULL REFERENCES sweeps (id),
    column_idx integer NOT NULL,
    tenant_id uuid NOT NULL,
    adapter text,                           -- the adapter's name; null for the base
    revision_id uuid REFERENCES adapter_revisions (id),
    PRIMARY KEY (sweep_id, column_idx)
);

-- The part of a job that changes. `lane` is the queue a job waits in: all jobs of one tenant for one adapter
-- revision, or for the base (then the tenant's own id stands for it).
CREATE TABLE jobs (
    id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL,
    batch_id uuid NOT NULL,
    pool text NOT NULL,
    revision_id uuid,
    lane uuid GENERATED ALWAYS AS (coalesce(revision_id, tenant_id)) STORED,
    state text NOT NULL DEFAULT 'queued'
        CHECK (state IN ('queued', 'leased', 'succeeded', 'failed', 'cancelled', 'expired')),
    is_held boolean NOT NULL DEFAULT false,     -- its batch is paused
    is_cancel_requested boolean NOT NULL DEFAULT false,
    priority smallint NOT NULL,
    est_tokens integer NOT NULL,            -- prompt + 2 x expected output tokens: what a claim charges
    worker_id uuid,
    attempt integer NOT NULL DEFAULT 0,
    crashes smallint NOT NULL DEFAULT 0,
    step_limit integer,                     -- after a crash: how many suspects may share its step
    deadline_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    leased_at timestamptz,
    finished_at timestamptz,
    CHECK ((state = 'leased') = (worker_id IS NOT NULL))
);
CREATE INDEX jobs_queue ON jobs (pool, lane, priority DESC, id) WHERE state = 'queued' AND NOT is_held;
CREATE INDEX jobs_leased ON jobs (worker_id) WHERE state = 'leased';
CREATE INDEX jobs_deadline ON jobs (deadline_at) WHERE state = 'queued' AND deadline_at IS NOT NULL;

-- The part of a job that never changes. A cell of a sweep names its prompt; any other job holds it.
CREATE TABLE job_inputs (
    job_id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL,
    batch_id uuid NOT NULL,
    custom_id text,
    adapter text,                           -- as it was named when the job was made
    prompt text,
    prompt_token_ids integer[],
    prompt_idx integer,
    column_idx integer,
    seed bigint NOT NULL,
    sampling jsonb,                         -- null: the sweep's
    retry_of uuid,
    CHECK (num_nonnulls(prompt, prompt_token_ids, prompt_idx) = 1)
);
CREATE INDEX job_inputs_batch_id ON job_inputs (batch_id, job_id);

-- One row a job that has ended, whatever its end; `seq` orders the results of a batch as they were committed.
CREATE TABLE job_results (
    job_id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL,
    batch_id uuid NOT NULL,
    seq bigint NOT NULL,
    state text NOT NULL,
    text text,
    token_ids integer[],
    logprobs real[],
    finish_reason text,
    error_code text,
    error_message text,
    prompt_tokens integer NOT NULL DEFAULT 0,
    completion_tokens integer NOT NULL DEFAULT 0,
    attempt integer NOT NULL DEFAULT 0,
    worker_id uuid
);
CREATE UNIQUE INDEX job_results_batch_id_seq ON job_results (batch_id, seq);

-- What a released job keeps.
CREATE TABLE checkpoints (
    job_id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL,
    token_ids integer[] NOT NULL,
    logprobs real[] NOT NULL
);

CREATE TABLE idempotency_keys (
    tenant_id uuid NOT NULL REFERENCES tenants (id),
    key text NOT NULL,
    request_sha256 bytea NOT NULL,
    resource_id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, key)
);
CREATE INDEX idempotency_keys_created_at ON idempotency_keys (created_at);

-- Jobs that wait and are not held, by lane and priority: what the dispatcher reads instead of the queue.
CREATE TABLE demand (
    pool text NOT NULL,
    lane uuid NOT NULL,
    priority smallint NOT NULL,
    tenant_id uuid NOT NULL,
    revision_id uuid,
    num_queued integer NOT NULL,
    PRIMARY KEY (pool, lane, priority)
) WITH (fillfactor = 50);

-- Service received, in tokens over weight: the least is served first.
CREATE TABLE tenant_counters (
    pool text NOT NULL,
    tenant_id uuid NOT NULL REFERENCES tenants (id),
    service double precision NOT NULL DEFAULT 0,
    is_backlogged boolean NOT NULL DEFAULT false,
    PRIMARY KEY (pool, tenant_id)
) WITH (fillfactor = 50);

-- One row for each job that was in the running step when an engine died.
CREATE TABLE crashes (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id uuid NOT NULL,
    job_id uuid NOT NULL,
    revision_id uuid,
    worker_id uuid NOT NULL,
    death_id uuid NOT NULL,                 -- which death: a note of it that is repeated counts once
    num_suspects integer NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE UNIQUE INDEX crashes_job_id_death_id ON crashes (job_id, death_id);
CREATE INDEX crashes_revision_id ON crashes (revision_id);

CREATE TABLE workers (
    id uuid PRIMARY KEY,
    pool text NOT NULL,
    host text NOT NULL,
    pid integer NOT NULL,
    state text NOT NULL CHECK (state IN ('asleep', 'waking', 'active', 'draining', 'gone')),
    desired_state text NOT NULL CHECK (desired_state IN ('asleep', 'active', 'draining', 'gone')),
    lease_until timestamptz NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp(),  -- of state or desired_state
    max_num_seqs integer NOT NULL,
    num_pages integer NOT NULL DEFAULT 0,
    page_size integer NOT NULL DEFAULT 0,
    num_tiles integer NOT NULL DEFAULT 0,
    resident uuid[] NOT NULL DEFAULT '{}',  -- adapter revisions in device memory
    stats jsonb NOT NULL DEFAULT '{}'
) WITH (fillfactor = 50);
CREATE INDEX workers_pool ON workers (pool) WHERE state <> 'gone';

CREATE TABLE leaders (
    pool text PRIMARY KEY,
    holder uuid NOT NULL,
    term bigint NOT NULL,
    until timestamptz NOT NULL
);
"""

TENANT_FUNCTION = """
CREATE FUNCTION medley_tenant() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
AS $$ SELECT nullif(current_setting('medley.tenant', true), '')::uuid $$
"""

ROLES = ("medley_api", "medley_work")
PASSWORDS = {"medley_api": "MEDLEY_API_PASSWORD", "medley_work": "MEDLEY_WORK_PASSWORD"}


def upgrade() -> None:
    _create_roles()
    op.execute(TABLES)
    op.execute(TENANT_FUNCTION)
    for table in TENANT_TABLES:
        column = "id" if table == "tenants" else "tenant_id"
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        # The sub-select is evaluated once a statement, not once a row.
        mine = f"{column} = (SELECT medley_tenant())"
        op.execute(f"CREATE POLICY tenant ON {table} TO medley_api USING ({mine}) WITH CHECK ({mine})")
        op.execute(f"CREATE POLICY work ON {table} TO medley_work USING (true) WITH CHECK (true)")
    # A request is known by its key before its tenant is: it may read that one key's row and no other.
    op.execute(
        "CREATE POLICY presented ON api_keys FOR SELECT TO medley_api"
        " USING (id = (SELECT nullif(current_setting('medley.key', true), '')))"
    )
    # Operators make tenants and keys as the owner.
    for table in ("tenants", "api_keys"):
        op.execute(f"CREATE POLICY operator ON {table} TO medley_owner USING (true) WITH CHECK (true)")
    _grant()


def downgrade() -> None:
    tables = ", ".join((*reversed(TENANT_TABLES), "workers", "leaders"))
    op.execute(f"DROP TABLE {tables} CASCADE")
    op.execute("DROP FUNCTION medley_tenant()")
    for role in ROLES:
        # Roles belong to the whole server, where other databases may use them: only this one's grants go.
        op.execute(f"REVOKE ALL ON alembic_version FROM {role}")
        op.execute(f"REVOKE ALL ON SCHEMA public FROM {role}")


def _create_roles() -> None:
    connection = op.get_bind()
    for role in ROLES:
        if not connection.scalar(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}):
            op.execute(f"CREATE ROLE {role} LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEDB NOCREATEROLE")
        if password := os.environ.get(PASSWORDS[role]):
            # ALTER ROLE takes no parameters; quote_literal makes the text safe.
            literal = connection.scalar(text("SELECT quote_literal(:password)"), {"password": password})
            connection.exec_driver_sql(f"ALTER ROLE {role} PASSWORD {literal}")


def _grant() -> None:
    op.execute("GRANT USAGE ON SCHEMA public TO medley_api, medley_work")
    op.execute("GRANT EXECUTE ON FUNCTION medley_tenant() TO medley_api, medley_work")
    # What the API writes: creates, flags and uploads. It never claims, completes or leads.
    op.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO medley_api")
    op.execute(
        "GRANT INSERT ON adapters, adapter_revisions, batches, sweeps, sweep_prompts, sweep_columns,"
        " jobs, job_inputs, job_results, idempotency_keys, demand TO medley_api"
    )
    op.execute("GRANT UPDATE ON batches TO medley_api")
    op.execute("GRANT UPDATE (state, worker_id, finished_at, is_held, is_cancel_requested) ON jobs TO medley_api")
    op.execute("GRANT UPDATE (num_queued) ON demand TO medley_api")
    op.execute("GRANT UPDATE (deleted_at) ON adapters TO medley_api")
    op.execute("GRANT UPDATE (uploaded_at) ON adapter_revisions TO medley_api")
    op.execute("GRANT DELETE ON checkpoints TO medley_api")
    op.execute("REVOKE ALL ON alembic_version FROM medley_api")
    op.execute("GRANT SELECT ON alembic_version TO medley_api, medley_work")
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO medley_work")
    op.execute("REVOKE INSERT, UPDATE, DELETE ON tenants, api_keys, alembic_version FROM medley_work")
