"""Indexes by which a large fleet's queue is read beside an old snapshot: no look passes what others have ended.

Rows that were claimed or have ended stay in an index for as long as any session's snapshot is older. What a worker
holds is found from its oldest job on; jobs that were given back, whose ids lie before those that were claimed since,
have an index of their own.

Revision ID: 0011
"""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("DROP INDEX jobs_leased")
    op.execute("CREATE INDEX jobs_leased ON jobs (worker_id, leased_at) WHERE state = 'leased'")
    op.execute(
        "CREATE INDEX jobs_returned ON jobs (pool, lane, priority)"
        " WHERE state = 'queued' AND NOT is_held AND attempt > 0"
    )


def downgrade() -> None:
    op.execute("DROP INDEX jobs_returned")
    op.execute("DROP INDEX jobs_leased")
    op.execute("CREATE INDEX jobs_leased ON jobs (worker_id) WHERE state = 'leased'")
