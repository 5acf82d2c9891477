"""The fleet by hand: what an operator holds workers to, a log of it, and what each worker's batch is made of.

Revision ID: 0010
"""

from __future__ import annotations

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

TABLES = """
ALTER TABLE workers
    ADD COLUMN version text NOT NULL DEFAULT '',        -- of the package that the worker runs
    -- What the operator says by hand: the policy leaves the worker there until he releases it.
    ADD COLUMN held_state text CHECK (held_state IN ('active', 'asleep')),
    ADD COLUMN held_by text,
    ADD COLUMN held_at timestamptz,
    ADD CONSTRAINT workers_held CHECK ((held_state IS NULL) = (held_at IS NULL));

-- Whose jobs run on a worker, as it last said. A table of its own: a plan reads all workers and none of this, and
-- medley_api, which tenants reach, reads workers and none of this either.
CREATE TABLE worker_batches (
    worker_id uuid PRIMARY KEY REFERENCES workers (id) ON DELETE CASCADE,
    batch jsonb NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);

-- What operators did to workers. No reference: it outlives them.
CREATE TABLE fleet_log (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    pool text NOT NULL,
    worker_id uuid NOT NULL,
    action text NOT NULL,
    operator text NOT NULL,
    details jsonb NOT NULL DEFAULT '{}',
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON fleet_log
    FOR EACH STATEMENT EXECUTE FUNCTION medley_append_only();
"""


def upgrade() -> None:
    op.execute(TABLES)
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON worker_batches TO medley_work")
    op.execute("GRANT SELECT ON fleet_log TO medley_work")
    # Workers and dispatchers do what a hold says; only the operator, as the owner, says it.
    op.execute("REVOKE UPDATE ON workers FROM medley_work")
    op.execute(
        "GRANT UPDATE (state, desired_state, lease_until, changed_at, max_num_seqs, num_pages, page_size, num_tiles,"
        " resident, stats, version) ON workers TO medley_work"
    )


def downgrade() -> None:
    op.execute("DROP TABLE fleet_log, worker_batches")
    op.execute(
        "ALTER TABLE workers DROP COLUMN held_at, DROP COLUMN held_by, DROP COLUMN held_state, DROP COLUMN version"
    )
    op.execute("GRANT UPDATE ON workers TO medley_work")
