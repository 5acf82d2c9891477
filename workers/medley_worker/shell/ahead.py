"""Adapters that come next, as the dispatcher announces them: looked up, and handed to the engine.

An announcement names revisions and nothing more: whose they are and which files they have is read from PostgreSQL, so
that no message can put an adapter in another's place. All of it is a hint: what cannot be had now is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy import Connection

from medley.db.adapters import read_sizes
from medley.objects import StoreError
from medley.spec.wire import AdapterRef
from medley_worker.shell.adapter_folders import AdapterFolders
from medley_worker.shell.feed import Feed
from medley_worker.shell.transactions import Transactions, Unreachable

MAX_ANNOUNCED = 64
MAX_KNOWN = 4_096


class Ahead:
    """For the thread of messages alone."""

    def __init__(self, transactions: Transactions, folders: AdapterFolders, feed: Feed) -> None:
        self._transactions = transactions
        self._folders = folders
        self._feed = feed
        self._known: dict[UUID, AdapterRef] = {}

    def announce(self, revisions: Sequence[UUID]) -> None:
        """The adapters of jobs that are likely to be assigned next, nearest first, in place of those before."""
        revisions = revisions[:MAX_ANNOUNCED]
        self._look_up([revision for revision in revisions if revision not in self._known])
        self._feed.expect(tuple(self._known[revision] for revision in revisions if revision in self._known))

    def _look_up(self, revisions: list[UUID]) -> None:
        if not revisions:
            return
        if len(self._known) > MAX_KNOWN:
            self._known.clear()

        def read(conn: Connection) -> list[tuple[UUID, UUID, str]]:
            return [(row.tenant_id, row.id, row.digest) for row in read_sizes(conn, revisions)]

        try:
            found = self._transactions.run(read)
        except Unreachable:
            return
        for tenant, revision, digest in found:
            try:
                path = self._folders.local_path(digest)
            except (StoreError, OSError):
                continue  # its jobs will say so
            if path is not None:
                self._known[revision] = AdapterRef(tenant, revision, str(path))
