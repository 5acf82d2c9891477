"""Idempotency keys of requests: what makes two requests equal, and the header that says a create was a replay."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from uuid import UUID

from fastapi import Request
from sqlalchemy import Connection

from medley.api.errors import InvalidRequest
from medley.db.idempotency import claim_key
from medley.spec.errors import Fault

HEADER = "idempotency-key"
MAX_KEY_CHARS = 200
REPLAYED = {"Idempotent-Replayed": "true"}


@dataclass(frozen=True)
class Create:
    """A create as it was asked for: its key (None: none was sent) and the digest of the whole request."""

    key: str | None
    digest: bytes

    def claim(self, conn: Connection, tenant: UUID, resource: UUID) -> UUID | None:
        """None: go on and create `resource`. Else the resource that this request has made before.

        Waits for an equal request that is being served. Raises KeyConflict.
        """
        if self.key is None:
            return None
        return claim_key(conn, tenant, self.key, self.digest, resource)


def read_create(request: Request, body_sha256: bytes) -> Create:
    """The create in `request`. Raises InvalidRequest for a key that is none."""
    key = request.headers.get(HEADER)
    if (num_keys := len(request.headers.getlist(HEADER))) > 1:
        raise InvalidRequest.of([Fault(field="Idempotency-Key", got=f"{num_keys} of them", wanted="one")])
    if key is not None and not (1 <= len(key) <= MAX_KEY_CHARS and key.isascii() and key.isprintable()):
        fault = Fault(field="Idempotency-Key", got=repr(key)[:80], wanted=f"1 to {MAX_KEY_CHARS} printable characters")
        raise InvalidRequest.of([fault])
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    parts = (request.method, request.url.path, request.url.query, kind, body_sha256.hex())
    return Create(key, hashlib.sha256("\n".join(parts).encode()).digest())
