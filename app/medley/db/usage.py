"""Usage: what workers did for a tenant, by day and adapter revision.

`medley.db.ends` adds to it in the statement that completes a job, so a token is counted once, on the day (UTC) on
which its job ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Row, text


class By(StrEnum):
    """What a row of usage is about."""

    DAY = "day"
    ADAPTER = "adapter"
    REVISION = "revision"


_KEYS = {
    By.DAY: "u.day, NULL::text AS adapter, NULL::uuid AS revision_id",
    # An adapter that is not the tenant's own has no name that it may see: its revisions stand for it.
    By.ADAPTER: "NULL::date AS day, a.name AS adapter, CASE WHEN a.id IS NULL THEN u.revision_id END AS revision_id",
    By.REVISION: "NULL::date AS day, a.name AS adapter, u.revision_id",
}


def read_usage(conn: Connection, first: date, last: date, by: By) -> Sequence[Row[Any]]:
    """(day, adapter, revision_id, num_jobs, prompt_tokens, completion_tokens) of the caller, from `first` to `last`.

    Days in order; adapters by name, the base (neither adapter nor revision) last.
    """
    statement = (
        f"SELECT {_KEYS[by]}, sum(u.num_jobs)::int8 AS num_jobs, sum(u.prompt_tokens)::int8 AS prompt_tokens,"
        " sum(u.completion_tokens)::int8 AS completion_tokens FROM usage u"
        " LEFT JOIN adapter_revisions r ON r.id = u.revision_id LEFT JOIN adapters a ON a.id = r.adapter_id"
        " WHERE u.day BETWEEN :first AND :last GROUP BY 1, 2, 3 ORDER BY 1, 2 NULLS LAST, 3 NULLS LAST"
    )
    return conn.execute(text(statement), {"first": first, "last": last}).all()
