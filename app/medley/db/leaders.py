"""The leader of a pool: one row (holder, term, until) on the database's clock."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import Connection, text


class TermLost(Exception):
    """Another dispatcher leads, or the term has run out. Nothing of this transaction may stand."""


# A standby's look each tick must not lock the row: frozen in that moment it would stop the leader.
_LED_BY_ANOTHER = text("SELECT 1 FROM leaders WHERE pool = :pool AND holder <> :holder AND until > clock_timestamp()")

_LEAD = text(
    "INSERT INTO leaders AS l (pool, holder, term, until)"
    " VALUES (:pool, :holder, 1, clock_timestamp() + make_interval(secs => :term_s))"
    " ON CONFLICT (pool) DO UPDATE SET holder = excluded.holder,"
    "  term = CASE WHEN l.holder = excluded.holder AND l.until > clock_timestamp() THEN l.term ELSE l.term + 1 END,"
    "  until = clock_timestamp() + make_interval(secs => :term_s)"
    " WHERE l.holder = excluded.holder OR l.until <= clock_timestamp()"
    " RETURNING term"
)


def lead(conn: Connection, pool: str, holder: UUID, *, term_s: float) -> int | None:
    """Takes or prolongs the lead. Returns the term, or None while another holds it.

    A term that has lapsed is not prolonged: the same holder begins a new one.
    """
    if conn.execute(_LED_BY_ANOTHER, {"pool": pool, "holder": holder}).one_or_none() is not None:
        return None
    term: int | None = conn.execute(_LEAD, {"pool": pool, "holder": holder, "term_s": term_s}).scalar_one_or_none()
    return term


def hold_term(conn: Connection, pool: str, holder: UUID, term: int) -> None:
    """Pins the term for this transaction: first statement of every write of a dispatcher. Raises TermLost."""
    row = conn.execute(
        text(
            "SELECT 1 FROM leaders WHERE pool = :pool AND holder = :holder AND term = :term"
            " AND until > clock_timestamp() FOR SHARE"
        ),
        {"pool": pool, "holder": holder, "term": term},
    ).one_or_none()
    if row is None:
        raise TermLost(f"dispatcher {holder} no longer holds term {term} of pool {pool!r}")


def resign(conn: Connection, pool: str, holder: UUID, term: int) -> None:
    """Ends the term at once, so that a standby need not wait for it."""
    conn.execute(
        text("UPDATE leaders SET until = clock_timestamp() WHERE pool = :pool AND holder = :holder AND term = :term"),
        {"pool": pool, "holder": holder, "term": term},
    )


def forget_leaders(conn: Connection, *, older_than_s: float) -> int:
    """Deletes terms that ran out this long ago. Returns how many.

    The pool's next term is numbered from 1 again: a dispatcher that held the old one still differs by its id.
    """
    statement = "DELETE FROM leaders WHERE until < clock_timestamp() - make_interval(secs => :age)"
    return conn.execute(text(statement), {"age": older_than_s}).rowcount
