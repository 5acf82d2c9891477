"""Files and OpenAI batches: what the OpenAI-compatible interface keeps beside native batches and jobs.

Revision ID: 0008
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

TENANT_TABLES = ("files", "openai_batches", "openai_batch_models")

TABLES = """
-- A tenant's file. Its bytes lie in the store under `object_key`; a row without `stored_at` is being written, or its
-- writer died, and is shown to nobody.
CREATE TABLE files (
    id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL REFERENCES tenants (id),
    purpose text NOT NULL CHECK (purpose IN ('batch', 'batch_output')),
    filename text NOT NULL,
    object_key text NOT NULL UNIQUE,
    size_bytes bigint NOT NULL,
    sha256 bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,
    stored_at timestamptz,
    deleted_at timestamptz                  -- its bytes and then its row go next
);
CREATE INDEX files_tenant_id_id ON files (tenant_id, id);

-- A batch made from a file of lines, each a request that may be several jobs: its id is the batch's. While the
-- batch's cancel is asked for and the state is not an end, it is shown as cancelling. Files that it names carry no
-- foreign key: a tenant may delete one while the batch lives on.
CREATE TABLE openai_batches (
    id uuid PRIMARY KEY REFERENCES batches (id),
    tenant_id uuid NOT NULL REFERENCES tenants (id),
    endpoint text NOT NULL,
    input_file_id uuid NOT NULL,
    completion_window text NOT NULL,
    metadata jsonb,
    output_expires_after_s integer,
    state text NOT NULL DEFAULT 'validating' CHECK (state IN
        ('validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired', 'cancelled')),
    due_at timestamptz DEFAULT clock_timestamp(),   -- when a task may take the next step; null: there is none to take
    model text,                             -- that every line names; null: several, or not known yet
    num_requests integer NOT NULL DEFAULT 0,
    num_jobs integer NOT NULL DEFAULT 0,
    next_offset bigint,                     -- the byte of the input from which lines become jobs next; null: none do
    errors jsonb,                           -- of validation
    in_progress_at timestamptz,
    finalizing_at timestamptz,
    ended_at timestamptz,                   -- when it came to the state it is in now, which is an end
    num_completed integer,                  -- these four are counted while the files are written
    num_failed integer,
    input_tokens bigint,
    output_tokens bigint,
    output_file_id uuid,
    error_file_id uuid,
    CHECK ((ended_at IS NOT NULL) = (state IN ('failed', 'completed', 'expired', 'cancelled')))
);
CREATE INDEX openai_batches_tenant_id_id ON openai_batches (tenant_id, id);
CREATE INDEX openai_batches_due_at ON openai_batches (due_at) WHERE due_at IS NOT NULL;
CREATE INDEX openai_batches_running ON openai_batches (id) WHERE state = 'in_progress' AND due_at IS NULL;

-- What the models that lines name meant when the batch was validated. A revision may be one that another tenant
-- shares, which goes with its owner: the jobs then say so.
CREATE TABLE openai_batch_models (
    batch_id uuid NOT NULL REFERENCES openai_batches (id),
    model text NOT NULL,
    tenant_id uuid NOT NULL,
    revision_id uuid,                       -- null: the base
    PRIMARY KEY (batch_id, model)
);

-- Null in the rows of jobs that were not made here, where they take no room.
ALTER TABLE job_inputs
    ADD COLUMN is_templated boolean,        -- the prompt holds its special tokens: none are added
    ADD COLUMN answer jsonb;                -- what an answer shows of the result; null: its text alone
"""

MINE = "tenant_id = (SELECT medley_tenant())"
# A file is kept for its own time, and no longer than its tenant keeps anything.
KEPT_FILE = f"{MINE} AND created_at > (SELECT medley_kept_since())"


def upgrade() -> None:
    op.execute(TABLES)
    for table in TENANT_TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        shown = KEPT_FILE if table == "files" else MINE
        op.execute(f"CREATE POLICY tenant ON {table} TO medley_api USING ({shown}) WITH CHECK ({MINE})")
        op.execute(f"CREATE POLICY work ON {table} TO medley_work USING (true) WITH CHECK (true)")
        op.execute(f"CREATE POLICY owner ON {table} TO medley_owner USING (true) WITH CHECK (true)")
    tables = ", ".join(TENANT_TABLES)
    op.execute(f"GRANT SELECT ON {tables} TO medley_api")
    op.execute("GRANT INSERT ON files, openai_batches TO medley_api")
    op.execute("GRANT UPDATE (stored_at, deleted_at) ON files TO medley_api")
    op.execute("GRANT UPDATE (due_at) ON openai_batches TO medley_api")
    op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO medley_work")


def downgrade() -> None:
    op.execute("ALTER TABLE job_inputs DROP COLUMN is_templated, DROP COLUMN answer")
    op.execute(f"DROP TABLE {', '.join(reversed(TENANT_TABLES))}")
