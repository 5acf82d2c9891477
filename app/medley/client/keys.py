"""A tenant's API keys: make, list, rotate, revoke. It takes a key with the scope admin."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

import msgspec

from medley.client.transport import Transport, segment
from medley.client.types import Key

PAGE = 1_000


class _Page(msgspec.Struct):
    keys: list[Key]
    next: str | None = None


class Keys:
    """The keys of the tenant. A key's `id` (`mk_...`) is public; `api_key`, the whole, is shown when it is made."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(self, name: str, *, scopes: Sequence[str] | None = None, expires_at: datetime | None = None) -> Key:
        """Makes a key. scopes: some of read, submit, adapters, admin; without any, all but admin.

        `api_key` is None where the service made it and its answer was lost on the way: revoke that one.
        """
        body = {"name": name, "scopes": scopes and list(scopes), "expires_at": expires_at}
        return self._post("/v1/keys", body)

    def rotate(self, key_id: str, *, expires_at: datetime | None = None, old_lives_s: float | None = None) -> Key:
        """Makes a successor of the same name and scopes; both work until the old one is revoked.

        old_lives_s: ends the old one by itself after so many seconds. Raises Conflict where that was done before.
        """
        return self._post(f"/v1/keys/{segment(key_id)}/rotate", {"expires_at": expires_at, "old_lives_s": old_lives_s})

    def revoke(self, key_id: str) -> None:
        """Ends a key for good, within seconds. Raises NotFound."""
        self._transport.request("DELETE", f"/v1/keys/{segment(key_id)}")

    def get(self, key_id: str) -> Key:
        """Raises NotFound."""
        return self._transport.get(Key, f"/v1/keys/{segment(key_id)}")

    def list(self) -> Iterator[Key]:
        """All keys, newest first, ended ones too."""
        before: str | None = None
        while True:
            page = self._transport.get(_Page, "/v1/keys", {"before": before, "limit": PAGE})
            yield from page.keys
            if page.next is None:
                return
            before = page.next

    def _post(self, path: str, fields: Mapping[str, object]) -> Key:
        body = {name: value for name, value in fields.items() if value is not None}
        return self._transport.post(Key, path, body, key=uuid.uuid4().hex)
