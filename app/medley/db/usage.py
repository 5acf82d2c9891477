"""Usage: what workers did for a tenant, by day and adapter revision; of another's adapter too, for whom it was done.

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


# As the tenant names it: another's while it is shared. One that it may not see has no name, and its revisions stand
# for it.
_NAME = (
    "CASE WHEN a.tenant_id = u.tenant_id THEN a.name ELSE"
    " (SELECT min(g.owner) FROM adapter_grants g WHERE g.adapter_id = a.id) || '/' || a.name END"
)
_KEYS = {
    By.DAY: "u.day, NULL::text AS adapter, NULL::uuid AS revision_id",
    By.ADAPTER: f"NULL::date AS day, {_NAME} AS adapter, CASE WHEN a.id IS NULL THEN u.revision_id END AS revision_id",
    By.REVISION: f"NULL::date AS day, {_NAME} AS adapter, u.revision_id",
}


def read_usage(conn: Connection, first: date, last: date, by: By) -> Sequence[Row[Any]]:
    """(day, adapter, revision_id, num_jobs, prompt_tokens, completion_tokens) of the caller, from `first` to `last`.

    Days in order; adapters by name, the base (neither adapter nor revision) last.
    """
    statement = (
        f"SELECT day, adapter, revision_id, sum(num_jobs)::int8 AS num_jobs, sum(prompt_tokens)::int8 AS prompt_tokens,"
        f" sum(completion_tokens)::int8 AS completion_tokens FROM (SELECT {_KEYS[by]}, u.num_jobs, u.prompt_tokens,"
        " u.completion_tokens FROM usage u LEFT JOIN adapter_revisions r ON r.id = u.revision_id"
        " LEFT JOIN adapters a ON a.id = r.adapter_id WHERE u.day BETWEEN :first AND :last) used"
        " GROUP BY 1, 2, 3 ORDER BY 1, 2 NULLS LAST, 3 NULLS LAST"
    )
    return conn.execute(text(statement), {"first": first, "last": last}).all()
