"""The lead of a pool: a term on the database's clock, prolonged while it is used, given up at the end.

Every transaction that writes begins by holding the term, so a leader that was stopped and goes on writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from medley.db import leaders
from medley.db.connections import transaction
from medley.spec.ids import uuid7

TERM_TICKS = 3  # a leader that misses this many ticks is succeeded

T = TypeVar("T")
log = structlog.get_logger()


class Lead:
    """One candidate's. `term`: in which it leads; None while another does."""

    def __init__(
        self, engine: Engine, pool: str, *, tick_s: float, clock: Callable[[], float], on_new: Callable[[], None]
    ) -> None:
        """on_new: called where a term begins and another may have led since the last one."""
        self.id = uuid7()
        self.term: int | None = None
        self._engine, self._pool = engine, pool
        self._tick_s, self._clock, self._on_new = tick_s, clock, on_new
        self._last_term: int | None = None
        self._due_at = clock()

    def renew(self) -> None:
        """Takes the lead or prolongs it, where that is due."""
        if self._clock() < self._due_at:
            return
        self._due_at = self._clock() + self._tick_s
        with transaction(self._engine) as conn:
            term = leaders.lead(conn, self._pool, self.id, term_s=TERM_TICKS * self._tick_s)
        if term is not None and term != self.term:
            log.info("term.began", dispatcher=self.id.hex, pool=self._pool, term=term)
            # Terms are counted: after its own last one nobody else has led, and what was seen still holds.
            if self._last_term is None or term > self._last_term + 1:
                self._on_new()
            self._last_term = term
        self.term = term

    def write(self, write: Callable[[Connection], T]) -> T:
        """One transaction of this term, which is prolonged where that is due. Raises TermLost."""
        term = self.term
        self.renew()
        if self.term is None or self.term != term:
            raise leaders.TermLost(f"dispatcher {self.id} lost term {term} of pool {self._pool!r}")
        with transaction(self._engine) as conn:
            leaders.hold_term(conn, self._pool, self.id, self.term)
            return write(conn)

    def lose(self) -> None:
        """Takes note that the term was lost; the next `renew` asks for the lead at once."""
        log.warning("term.lost", dispatcher=self.id.hex, pool=self._pool, term=self.term)
        self.term, self._due_at = None, self._clock()

    def resign(self) -> None:
        """Gives the lead up, so that a standby takes it at once."""
        if self.term is None:
            return
        try:
            with transaction(self._engine) as conn:
                leaders.resign(conn, self._pool, self.id, self.term)
        except DBAPIError:
            log.info("resign.failed", dispatcher=self.id.hex)  # the term runs out by itself
        self.term = None
