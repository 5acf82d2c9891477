"""/v1/keys: a tenant's own API keys, made, listed, rotated and revoked by one of its admin keys."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row

from medley.api.auth import Caller, administers
from medley.api.bodies import read_whole
from medley.api.decoding import Query, decode_fields
from medley.api.errors import Conflict, FaultList, InvalidRequest, NotFound
from medley.api.idempotency import REPLAYED, read_create
from medley.api.job_bodies import At, label_faults
from medley.api.shapes import answer
from medley.db.keys import (
    MAX_LIVE_KEYS,
    AlreadyRotated,
    NewKey,
    TooManyKeys,
    add_key,
    list_keys,
    parse_key_id,
    public_key_id,
    read_key,
    revoke_key,
    rotate_key,
)
from medley.spec.errors import Fault
from medley.spec.scopes import Scope

MAX_PAGE = 1_000
MAX_OLD_LIVES_S = 366 * 24 * 3600.0
# What a key may do where its maker does not say: all of a tenant's work, and no management.
DEFAULT_SCOPES = (Scope.READ, Scope.SUBMIT, Scope.ADAPTERS)

router = APIRouter(prefix="/v1/keys")


class KeyBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str
    scopes: list[Scope] = msgspec.field(default_factory=lambda: list(DEFAULT_SCOPES))
    expires_at: At | None = None


class RotationBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    expires_at: At | None = None
    old_lives_s: Annotated[float, msgspec.Meta(ge=0, le=MAX_OLD_LIVES_S)] | None = None


class Key(msgspec.Struct, kw_only=True):
    """`api_key`, the whole key, is in the answer that made it and nowhere else."""

    id: str
    object: Literal["key"] = "key"
    name: str | None
    scopes: list[str]
    state: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    replaces: str | None
    api_key: str | msgspec.UnsetType | None = msgspec.UNSET


@router.post("")
async def create(request: Request, who: Caller = Depends(administers)) -> Response:
    """201 with the key, shown once: the same create again answers without it."""
    body, digest = await read_whole(request)
    Query(request).end()
    found = decode_fields(body, KeyBody)
    faults = FaultList(found.faults)
    wanted = found.value
    if wanted is not None:
        faults.extend(label_faults("name", wanted.name))
        if not wanted.scopes and "scopes" not in found.bad:
            faults.add(Fault(field="scopes", got="none", wanted=f"some of {', '.join(Scope)}"))
    faults.raise_any()
    assert wanted is not None
    asked = read_create(request, digest)

    def act(conn: Connection) -> tuple[Row[Any], NewKey | None]:
        new = NewKey.draw()
        replayed = asked.claim(conn, who.tenant.id, _resource(new.id))
        if replayed is not None:
            return _read(conn, who, _key_id(replayed)), None
        try:
            is_made = add_key(
                conn,
                who.tenant.id,
                new,
                name=wanted.name,
                scopes=[scope.value for scope in wanted.scopes],
                expires_at=wanted.expires_at,
            )
        except TooManyKeys:
            raise _too_many() from None
        if not is_made:
            raise InvalidRequest.of([_past(wanted.expires_at)])
        row = _read(conn, who, new.id)
        who.note(conn, "key.create", public_key_id(new.id), name=row.name, scopes=row.scopes, expires_at=row.expires_at)
        return row, new

    row, new = await who.services.sql.run(who.tenant.id, act)
    return _created(row, new)


@router.post("/{key_id}/rotate")
async def rotate(key_id: str, request: Request, who: Caller = Depends(administers)) -> Response:
    """201 with a successor of the same name and scopes; both work until the old one is revoked or ends."""
    body, digest = await read_whole(request)
    Query(request).end()
    found = decode_fields(body or b"{}", RotationBody)
    FaultList(found.faults).raise_any()
    wanted = found.value or RotationBody()
    old = _parse(key_id)
    asked = read_create(request, digest)

    def act(conn: Connection) -> tuple[Row[Any], NewKey | None]:
        new = NewKey.draw()
        replayed = asked.claim(conn, who.tenant.id, _resource(new.id))
        if replayed is not None:
            return _read(conn, who, _key_id(replayed)), None
        if _read(conn, who, old).state != "live":
            raise Conflict(f"{public_key_id(old)} no longer lives: make a new key instead")
        try:
            is_made = rotate_key(
                conn, who.tenant.id, old, new, expires_at=wanted.expires_at, old_lives_s=wanted.old_lives_s
            )
        except TooManyKeys:
            raise _too_many() from None
        except AlreadyRotated:
            raise Conflict(f"{public_key_id(old)} was rotated before: revoke it or the newer key first") from None
        if not is_made:
            raise InvalidRequest.of([_past(wanted.expires_at)])
        row = _read(conn, who, new.id)
        who.note(conn, "key.rotate", public_key_id(old), successor=public_key_id(new.id), expires_at=row.expires_at)
        return row, new

    row, new = await who.services.sql.run(who.tenant.id, act)
    return _created(row, new)


@router.get("")
async def list_all(request: Request, who: Caller = Depends(administers)) -> Response:
    query = Query(request)
    limit = query.whole("limit", MAX_PAGE, low=1, high=MAX_PAGE)
    shown = query.text("before")
    before = None if shown is None else parse_key_id(shown)
    if shown is not None and before is None:
        query.refuse("before", "the id of a key")
    query.end()
    rows = await who.services.sql.run(
        who.tenant.id, lambda conn: list_keys(conn, who.tenant.id, before=before, limit=limit)
    )
    keys = [key_of(row) for row in rows]
    return answer({"keys": keys, "next": keys[-1].id if len(keys) == limit else None})


@router.get("/{key_id}")
async def read(key_id: str, request: Request, who: Caller = Depends(administers)) -> Response:
    Query(request).end()
    key = _parse(key_id)
    return answer(key_of(await who.services.sql.run(who.tenant.id, lambda conn: _read(conn, who, key))))


@router.delete("/{key_id}")
async def revoke(key_id: str, request: Request, who: Caller = Depends(administers)) -> Response:
    """204, also for a key that was revoked before. It opens nothing within seconds."""
    Query(request).end()
    key = _parse(key_id)

    def act(conn: Connection) -> None:
        if _read(conn, who, key).revoked_at is None:
            revoke_key(conn, who.tenant.id, key)
            who.note(conn, "key.revoke", public_key_id(key))

    await who.services.sql.run(who.tenant.id, act)
    return Response(status_code=204)


def key_of(row: Row[Any]) -> Key:
    """From a row of `keys.read_key`."""
    return Key(
        id=public_key_id(row.id),
        name=row.name,
        scopes=row.scopes,
        state=row.state,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
        replaces=None if row.replaces is None else public_key_id(row.replaces),
    )


def _created(row: Row[Any], new: NewKey | None) -> Response:
    key = key_of(row)
    key.api_key = None if new is None else new.text
    return answer(key, 201, REPLAYED if new is None else None)


def _read(conn: Connection, who: Caller, key_id: str) -> Row[Any]:
    row = read_key(conn, who.tenant.id, key_id)
    if row is None:
        raise NotFound("key", public_key_id(key_id))
    return row


def _parse(shown: str) -> str:
    key_id = parse_key_id(shown)
    if key_id is None:
        raise NotFound("key", shown)
    return key_id


# An idempotency key remembers a UUID; the 16 digits of a key's id are the end of one.
def _resource(key_id: str) -> UUID:
    return UUID(int=int(key_id, 16))


def _key_id(resource: UUID) -> str:
    return f"{resource.int:016x}"


def _past(expires_at: datetime | None) -> Fault:
    return Fault(field="expires_at", got=str(expires_at), wanted="a time to come")


def _too_many() -> Conflict:
    return Conflict(f"this tenant has {MAX_LIVE_KEYS} keys that live, which is the most: revoke some")
