"""Columns of sweeps set side by side: which prompts both have, and who answered them rightly.

Prompts of two sweeps are the same where they have one custom_id, or neither has one and they read the same; and where
the same answer is expected of both. Runs are paired by seed, or by their place among the seeds where the sweeps drew
different ones. Only the latest attempts count, and only pairs of which both have succeeded.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection, text

from medley.db.connections import allow_minutes
from medley.spec.ids import oldest_after
from medley.spec.paired import PromptPairs

_PAIRS = text(
    "WITH wanted AS ("
    " SELECT * FROM unnest(CAST(:columns AS int[]), CAST(:with_columns AS int[])) WITH ORDINALITY AS w(a, b, pair)"
    "), prompts AS ("
    " SELECT sweep_id, prompt_idx, expected, key,"
    "  row_number() OVER (PARTITION BY sweep_id, key ORDER BY prompt_idx) AS n"
    " FROM (SELECT sweep_id, prompt_idx, expected, CASE WHEN custom_id IS NOT NULL THEN 'c' || custom_id"
    "   ELSE 'p' || md5(coalesce(prompt, prompt_token_ids::text)"
    "    || coalesce(E'\\n' || continuation, continuation_token_ids::text, '')) END AS key"
    "  FROM sweep_prompts WHERE sweep_id IN (:sweep, :with_sweep)) k"
    "), shared AS ("
    " SELECT a.prompt_idx AS a, b.prompt_idx AS b, a.expected FROM prompts a JOIN prompts b ON a.key = b.key"
    "  AND a.n = b.n AND a.expected = b.expected WHERE a.sweep_id = :sweep AND b.sweep_id = :with_sweep"
    "), seeds AS ("
    " SELECT s.id AS sweep_id, q.seed, CASE WHEN (SELECT bool_and(q.seed = ANY(o.seeds)) FROM sweeps o"
    "   WHERE o.id IN (:sweep, :with_sweep)) THEN 's' || q.seed ELSE 'i' || q.idx END AS run"
    " FROM sweeps s CROSS JOIN unnest(s.seeds) WITH ORDINALITY AS q(seed, idx) WHERE s.id IN (:sweep, :with_sweep)"
    "), cells AS ("
    " SELECT i.batch_id AS sweep_id, i.column_idx, i.prompt_idx, q.run, btrim(r.text, E' \\t\\r\\n') AS answer"
    " FROM job_inputs i JOIN job_results r ON r.job_id = i.job_id AND r.job_id >= :oldest AND r.state = 'succeeded'"
    " JOIN seeds q ON q.sweep_id = i.batch_id AND q.seed = i.seed"
    " WHERE i.job_id >= :oldest AND ((i.batch_id = :sweep AND i.column_idx = ANY(CAST(:columns AS int[])))"
    "  OR (i.batch_id = :with_sweep AND i.column_idx = ANY(CAST(:with_columns AS int[]))))"
    "), pairs AS ("
    " SELECT w.pair, s.a AS prompt, x.answer = btrim(s.expected, E' \\t\\r\\n') AS is_right,"
    "  y.answer = btrim(s.expected, E' \\t\\r\\n') AS is_with_right"
    " FROM wanted w CROSS JOIN shared s"
    " JOIN cells x ON x.sweep_id = :sweep AND x.column_idx = w.a AND x.prompt_idx = s.a"
    " JOIN cells y ON y.sweep_id = :with_sweep AND y.column_idx = w.b AND y.prompt_idx = s.b AND y.run = x.run"
    ")"
    " SELECT pair, count(*) AS num, count(*) FILTER (WHERE is_right) AS correct,"
    "  count(*) FILTER (WHERE is_with_right) AS with_correct,"
    "  count(*) FILTER (WHERE is_right AND NOT is_with_right) AS only_correct,"
    "  count(*) FILTER (WHERE is_with_right AND NOT is_right) AS only_with_correct"
    " FROM pairs GROUP BY pair, prompt ORDER BY pair, prompt"
)


def read_pairs(
    conn: Connection, sweep: UUID, with_sweep: UUID, columns: Sequence[tuple[int, int]]
) -> list[list[PromptPairs]]:
    """For each (column of `sweep`, column of `with_sweep`) the prompts that both have answered, in order."""
    allow_minutes(conn)
    rows = conn.execute(
        _PAIRS,
        {
            "sweep": sweep,
            "with_sweep": with_sweep,
            "oldest": oldest_after(min(sweep, with_sweep)),
            "columns": [a for a, _ in columns],
            "with_columns": [b for _, b in columns],
        },
    )
    found: list[list[PromptPairs]] = [[] for _ in columns]
    for row in rows:
        pairs = PromptPairs(row.num, row.correct, row.with_correct, row.only_correct, row.only_with_correct)
        found[row.pair - 1].append(pairs)
    return found
