"""Retries of OpenAI batches by their tenant, and since when the input of one cannot be found.

Revision ID: 0009
"""

from __future__ import annotations

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

# What a retry sets back, in the transaction that makes its jobs.
REOPENED = "state, finalizing_at, ended_at, num_completed, num_failed, output_file_id, error_file_id"


def upgrade() -> None:
    op.execute(f"GRANT UPDATE ({REOPENED}) ON openai_batches TO medley_api")
    # Null: it was there when it was last looked for.
    op.execute("ALTER TABLE openai_batches ADD COLUMN input_lost_at timestamptz")


def downgrade() -> None:
    op.execute("ALTER TABLE openai_batches DROP COLUMN input_lost_at")
    op.execute(f"REVOKE UPDATE ({REOPENED}) ON openai_batches FROM medley_api")
