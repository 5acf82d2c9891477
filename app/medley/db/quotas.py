"""Quotas: how much a tenant may have, and how much it has.

The queue's use stands in a row a tenant (`tenant_usage`) that whoever makes or ends jobs changes in the same
transaction, after every other row, so that concurrent writers cannot deadlock and no two creates see the same room.
Adapters, and the bytes of adapters and files, are counted when one is added, under that row's lock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from medley.config import Quotas

QUOTA_NAMES = tuple(f.name for f in dataclasses.fields(Quotas))


@dataclass(frozen=True)
class Use:
    """What a tenant has now. Names as in `Quotas`."""

    queued_jobs: int
    queued_bytes: int
    adapters: int
    storage_bytes: int


class QuotaExceeded(Exception):
    """What was asked for would be more than the tenant may have: `used` + `asked` > `limit`."""

    def __init__(self, quota: str, *, limit: int, used: int, asked: int) -> None:
        super().__init__(f"{quota}: {used} used and {asked} asked for, of {limit}")
        self.quota, self.limit, self.used, self.asked = quota, limit, used, asked


def with_overrides(quotas: Quotas, row: Row[Any]) -> Quotas:
    """`quotas` with those that a row of `tenant_limits` sets."""
    own = {name: value for name in QUOTA_NAMES if (value := getattr(row, name)) is not None}
    return dataclasses.replace(quotas, **own)


def read_quotas(conn: Connection, tenant: UUID, defaults: Quotas) -> Quotas:
    """What the tenant may have, for those that do not come by a key."""
    row = conn.execute(text("SELECT * FROM tenant_limits WHERE tenant_id = :tenant"), {"tenant": tenant}).one_or_none()
    return defaults if row is None else with_overrides(defaults, row)


# The batch's own row is this transaction's already, or was locked first, as every writer does.
_RESERVE = text(
    "WITH counted AS (UPDATE batches SET queued_bytes = queued_bytes + :num_bytes WHERE id = :batch)"
    " INSERT INTO tenant_usage AS u (tenant_id, queued_jobs, queued_bytes) VALUES (:tenant, :num_jobs, :num_bytes)"
    " ON CONFLICT (tenant_id) DO UPDATE SET queued_jobs = u.queued_jobs + excluded.queued_jobs,"
    " queued_bytes = u.queued_bytes + excluded.queued_bytes RETURNING queued_jobs, queued_bytes"
)


def reserve(conn: Connection, tenant: UUID, quotas: Quotas, batch: UUID, *, num_jobs: int, num_bytes: int) -> None:
    """Counts jobs and prompt bytes that this transaction adds to `batch`. The last of its writes.

    Whoever ends the jobs gives them back (`medley.db.ends`). Raises QuotaExceeded; then nothing of the transaction may
    stand.
    """
    used = conn.execute(
        _RESERVE, {"tenant": tenant, "batch": batch, "num_jobs": num_jobs, "num_bytes": num_bytes}
    ).one()
    _check("queued_jobs", quotas.queued_jobs, used.queued_jobs - num_jobs, num_jobs)
    _check("queued_bytes", quotas.queued_bytes, used.queued_bytes - num_bytes, num_bytes)


def give_back(conn: Connection, tenant: UUID, *, num_jobs: int, num_bytes: int) -> None:
    """Counts no longer what was reserved for jobs that will never be made. The last of the transaction's writes."""
    conn.execute(
        text(
            "UPDATE tenant_usage SET queued_jobs = queued_jobs - :num_jobs, queued_bytes = queued_bytes - :num_bytes"
            " WHERE tenant_id = :tenant"
        ),
        {"tenant": tenant, "num_jobs": num_jobs, "num_bytes": num_bytes},
    )


def check_queue_room(conn: Connection, tenant: UUID, quotas: Quotas, *, num_jobs: int) -> None:
    """Refuses early what has no room now. Raises QuotaExceeded. `reserve` has the last word."""
    row = conn.execute(
        text("SELECT queued_jobs, queued_bytes FROM tenant_usage WHERE tenant_id = :tenant"), {"tenant": tenant}
    ).one_or_none()
    jobs, num_bytes = (0, 0) if row is None else row
    _check("queued_jobs", quotas.queued_jobs, jobs, num_jobs)
    _check("queued_bytes", quotas.queued_bytes, num_bytes, 1)


def lock_usage(conn: Connection, tenant: UUID) -> None:
    """Lets one transaction of the tenant at a time add what is counted rather than kept."""
    conn.execute(
        text(
            "INSERT INTO tenant_usage AS u (tenant_id, queued_jobs, queued_bytes) VALUES (:tenant, 0, 0)"
            " ON CONFLICT (tenant_id) DO UPDATE SET queued_jobs = u.queued_jobs"
        ),
        {"tenant": tenant},
    )


# Files of deleted adapters and of older revisions are stored too, and deleted files until their bytes are gone.
_STORED = (
    "(SELECT count(*) FROM adapters a WHERE a.tenant_id = :tenant AND a.deleted_at IS NULL) AS adapters,"
    " (SELECT coalesce(sum(size_bytes), 0)::bigint FROM adapter_revisions r WHERE r.tenant_id = :tenant)"
    " + (SELECT coalesce(sum(size_bytes), 0)::bigint FROM files f WHERE f.tenant_id = :tenant) AS storage_bytes"
)


def check_adapter_room(
    conn: Connection, tenant: UUID, quotas: Quotas, name: str, *, num_bytes: int, digest: str | None = None
) -> None:
    """Whether an upload to adapter `name` fits beside what is stored. Exact after `lock_usage`. Raises QuotaExceeded.

    digest: of the files, where known; those that the adapter has already take no room.
    """
    used = conn.execute(
        text(
            f"SELECT {_STORED}, EXISTS (SELECT FROM adapters a WHERE a.tenant_id = :tenant AND a.name = :name"
            "  AND a.deleted_at IS NULL) AS is_there,"
            " EXISTS (SELECT FROM adapters a JOIN adapter_revisions r ON r.adapter_id = a.id"
            "  WHERE a.tenant_id = :tenant AND a.name = :name AND r.digest = :digest) AS is_stored"
        ),
        {"tenant": tenant, "name": name, "digest": digest},
    ).one()
    _check("adapters", quotas.adapters, used.adapters, 0 if used.is_there else 1)
    _check("storage_bytes", quotas.storage_bytes, used.storage_bytes, 0 if used.is_stored else num_bytes)


def check_file_room(conn: Connection, tenant: UUID, quotas: Quotas, *, num_bytes: int) -> None:
    """Whether a file fits beside what is stored. Exact after `lock_usage`. Raises QuotaExceeded."""
    used = conn.execute(text(f"SELECT {_STORED}"), {"tenant": tenant}).one()
    _check("storage_bytes", quotas.storage_bytes, used.storage_bytes, num_bytes)


def read_use(conn: Connection, tenant: UUID) -> Use:
    """What the tenant has now."""
    row = conn.execute(
        text(
            "SELECT coalesce(u.queued_jobs, 0) AS queued_jobs, coalesce(u.queued_bytes, 0) AS queued_bytes,"
            f" {_STORED} FROM (SELECT) one LEFT JOIN tenant_usage u ON u.tenant_id = :tenant"
        ),
        {"tenant": tenant},
    ).one()
    return Use(**row._mapping)


def set_limits(conn: Connection, tenant: UUID, changes: Mapping[str, float | None]) -> None:
    """Sets the tenant's own limits; None goes back to the configuration's. For the operator."""
    unknown = changes.keys() - set(QUOTA_NAMES)
    if unknown:
        raise ValueError(f"no such quotas: {', '.join(sorted(unknown))}")
    conn.execute(
        text("INSERT INTO tenant_limits (tenant_id) VALUES (:tenant) ON CONFLICT DO NOTHING"), {"tenant": tenant}
    )
    if not changes:
        return
    sets = ", ".join(f"{name} = :{name}" for name in changes)
    conn.execute(text(f"UPDATE tenant_limits SET {sets} WHERE tenant_id = :tenant"), {"tenant": tenant, **changes})


def _check(quota: str, limit: int, used: int, asked: int) -> None:
    if asked > 0 and used + asked > limit:
        raise QuotaExceeded(quota, limit=limit, used=used, asked=asked)
