"""The leader's books as they are kept: begun by a whole look, followed from change to change, and folded in the rows.

Owns what the leader knows of demand and counters, and when it looks at what; what is in them is `books`. All of it is
seen again by whoever leads next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from uuid import UUID

from sqlalchemy import Connection

from medley.db import changes, counters
from medley.dispatcher.books import Books
from medley.dispatcher.heads import Queue
from medley.dispatcher.plans import Tenant

FOLD_EVERY_S = 30.0  # each time a sum gets one more version, which everybody passes who looks for it
WHOLE_EVERY_S = 60.0  # what was erased with its tenant is no change; and sums of floats drift
WEIGHTS_EVERY_S = 5.0

Write = Callable[[Callable[[Connection], bool]], bool]  # one transaction of the leader's term


class Bookkeeper:
    def __init__(self, pool: str) -> None:
        self._pool = pool
        self._books: Books | None = None
        self._weights: dict[UUID, float] = {}
        self._folding: changes.Folding | None = None
        self._unfolded = 0  # changes of transactions below this one are in the sums
        self._fold_due_at = self._whole_due_at = self._weights_due_at = 0.0

    @property
    def books(self) -> Books:
        assert self._books is not None
        return self._books

    @property
    def has_begun(self) -> bool:
        return self._books is not None

    def look(self, conn: Connection, now: float) -> list[tuple[Queue, UUID]]:
        """Brings the books up to date, in a transaction that has written nothing. Returns what `Books.follow` does."""
        if self._books is None:
            self._fold_due_at = now  # nobody may have folded for long
            came = []
        else:
            came = self._books.follow(changes.read_since(conn, self._pool, self._books.horizon))
        if self._books is None or now >= self._whole_due_at:
            self._books = Books(changes.read_whole(conn, self._pool, self._unfolded))
            self._whole_due_at = now + WHOLE_EVERY_S
        return came

    def accounts(self, conn: Connection, tenants: Collection[UUID], now: float) -> list[Tenant]:
        """The accounts of `tenants`, and of all that were last seen backlogged."""
        wanted = {*tenants, *self.books.backlogged}
        if now >= self._weights_due_at or not self._weights.keys() >= wanted:
            self._weights = dict.fromkeys(wanted, 1.0) | counters.read_weights(conn, wanted)
            self._weights_due_at = now + WEIGHTS_EVERY_S
        return self.books.accounts(wanted, self._weights)

    def fold(self, write: Write, now: float, may_go_on: Callable[[], bool]) -> None:
        """Folds what the books have, where that is due, in one transaction after another while it may go on."""
        if self._books is None or (self._folding is None and now < self._fold_due_at):
            return
        folding = self._folding or changes.Folding(self._books.horizon, self._unfolded, self._unfolded)
        is_done = False
        while not is_done:
            # Kept as what was committed alone.
            going_on = replace(folding)
            is_done = write(partial(changes.fold, pool=self._pool, folding=going_on))
            folding = self._folding = going_on
            if not may_go_on():
                break
        if is_done:
            self._unfolded, self._folding = folding.seen.begin, None
            self._fold_due_at = now + FOLD_EVERY_S
