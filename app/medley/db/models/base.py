"""What the tables have in common: their registry, and columns that many of them have."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Integer, MetaData, text
from sqlalchemy.dialects.postgresql import TIMESTAMP, UUID

metadata = MetaData(
    naming_convention={
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
        "pk": "%(table_name)s_pkey",
    }
)

AT = TIMESTAMP(timezone=True)
NOW = text("clock_timestamp()")


def id_column(name: str = "id") -> Column[object]:
    """The primary key of what has an id."""
    return Column(name, UUID, primary_key=True)


def tenant_id(*, references: bool = True) -> Column[object]:
    """Whose row it is. Tables that grow with jobs carry no foreign keys (see migration 0001)."""
    return Column("tenant_id", UUID, *([ForeignKey("tenants.id")] if references else []), nullable=False)


def created_at() -> Column[object]:
    """When the row was made."""
    return Column("created_at", AT, nullable=False, server_default=NOW)


def count(name: str, kind: type[Integer] = Integer) -> Column[object]:
    """A number that begins at 0."""
    return Column(name, kind, nullable=False, server_default=text("0"))
