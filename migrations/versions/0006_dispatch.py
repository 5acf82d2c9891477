"""Forecasts of open batches, and the indexes by which the dispatcher finds open ones.

Revision ID: 0006
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TABLES = """
-- When an open batch will be done, as the dispatcher last judged; gone soon after the batch or its dispatcher is.
CREATE TABLE batch_forecasts (
    batch_id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL,
    ends_at timestamptz NOT NULL,
    is_late boolean NOT NULL,               -- after the batch's deadline
    made_at timestamptz NOT NULL DEFAULT clock_timestamp()
) WITH (fillfactor = 50);

CREATE INDEX batches_open ON batches (pool, id) WHERE finished_at IS NULL;
CREATE INDEX batches_due ON batches (pool, deadline_at) WHERE finished_at IS NULL AND deadline_at IS NOT NULL;
"""


def upgrade() -> None:
    op.execute(TABLES)
    op.execute("ALTER TABLE batch_forecasts ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE batch_forecasts FORCE ROW LEVEL SECURITY")
    mine = "tenant_id = (SELECT medley_tenant())"
    op.execute(f"CREATE POLICY tenant ON batch_forecasts TO medley_api USING ({mine}) WITH CHECK ({mine})")
    op.execute("CREATE POLICY work ON batch_forecasts TO medley_work USING (true) WITH CHECK (true)")
    op.execute("CREATE POLICY owner ON batch_forecasts TO medley_owner USING (true) WITH CHECK (true)")
    op.execute("GRANT SELECT ON batch_forecasts TO medley_api")
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON batch_forecasts TO medley_work")


def downgrade() -> None:
    op.execute("DROP INDEX batches_due, batches_open")
    op.execute("DROP TABLE batch_forecasts")
