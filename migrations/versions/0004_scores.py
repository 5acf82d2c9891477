"""Scores: continuations to be scored, samples of one prompt, and log-probabilities beyond those of generated tokens.

All columns are null in the rows of jobs that do not ask for them, where they take no room.

Revision ID: 0004
"""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

COLUMNS = {
    # One of both makes a scoring job: nothing is generated, the continuation is scored given the prompt.
    "job_inputs": {"continuation": "text", "continuation_token_ids": "integer[]", "sample_idx": "integer"},
    "sweep_prompts": {"continuation": "text", "continuation_token_ids": "integer[]"},
    "job_results": {
        "top_token_ids": "integer[]",  # k a token of token_ids, likeliest first, flat
        "top_logprobs": "real[]",
        "prompt_token_ids": "integer[]",
        "prompt_logprobs": "real[]",  # of each of its tokens but the first
        "prompt_top_token_ids": "integer[]",  # k for each of prompt_logprobs, flat
        "prompt_top_logprobs": "real[]",
        "is_greedy": "boolean",  # of a scored continuation: each token is the likeliest at its place
    },
    "checkpoints": {"details": "jsonb"},  # what was found beyond the tokens that are kept
}
SCORED = ("job_inputs", "sweep_prompts")


def upgrade() -> None:
    for table, columns in COLUMNS.items():
        added = ", ".join(f"ADD COLUMN {name} {kind}" for name, kind in columns.items())
        op.execute(f"ALTER TABLE {table} {added}")
    for table in SCORED:
        op.execute(
            f"ALTER TABLE {table} ADD CONSTRAINT {table}_continuation_check"
            " CHECK (continuation IS NULL OR continuation_token_ids IS NULL)"
        )


def downgrade() -> None:
    for table, columns in COLUMNS.items():
        op.execute(f"ALTER TABLE {table} " + ", ".join(f"DROP COLUMN {name}" for name in columns))
