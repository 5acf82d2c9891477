"""/v1/adapters: upload, list, read, delete. An upload is judged whole before anything is stored."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row

from medley.api.auth import Caller, adapts, reads
from medley.api.decoding import Query
from medley.api.errors import InvalidRequest, NotFound, NotReady
from medley.api.shapes import adapter_of, answer
from medley.api.uploads import Upload
from medley.db.adapters import (
    NAME,
    NewRevision,
    add_revision,
    delete_adapter,
    hold_digest,
    list_adapters,
    read_adapter,
)
from medley.db.quotas import check_adapter_room, lock_usage
from medley.spec.adapters import AdapterHeader
from medley.spec.base_models import BaseModel, linear_sites
from medley.spec.errors import Fault
from medley.spec.ids import REVISION, public_id
from medley.spec.intake import check_upload, max_weights_bytes
from medley.spec.strict_json import shown_name

MAX_PAGE = 10_000
PAGE = 1_000
TILE_RANKS = 8  # ranks of one projection group, over all layers, in a tile of device memory

router = APIRouter(prefix="/v1/adapters")


@router.put("/{name}")
async def put(name: str, request: Request, who: Caller = Depends(adapts)) -> Response:
    """201 for a new revision, 200 where the same files were there. Raises InvalidRequest with every reason."""
    Query(request).end()
    if not NAME.fullmatch(name):
        wanted = "1 to 128 letters, digits, dots, dashes or underscores, a letter or digit first"
        raise InvalidRequest.of([Fault(field="name", got=shown_name(name), wanted=wanted)])
    services = who.services
    base = services.base
    if base is None:
        raise NotReady("this service was started without a base model (MEDLEY_MODEL), so adapters cannot be judged")
    # A full store is not first sent a gigabyte to refuse.
    await services.sql.run(who.tenant.id, lambda conn: _check_room(conn, who, name, num_bytes=1))
    max_bytes = min(services.settings.limits.max_adapter_bytes, max_weights_bytes(base))
    with Upload(max_bytes) as upload:
        await upload.receive(request)
        header = await services.take_in(lambda: _judge(upload, base))
        num_bytes = len(upload.config) + header.size_bytes
        await services.sql.run(who.tenant.id, lambda conn: _check_room(conn, who, name, num_bytes=num_bytes))
        while True:
            digest = await services.take_in(lambda: services.store.put(bytes(upload.config), upload.weights_path))
            revision = NewRevision(digest, header.max_rank, num_tiles(header, base), num_bytes)
            found = await services.sql.run(who.tenant.id, partial(_add, who=who, name=name, revision=revision))
            if found is not None:  # else its files were deleted, as a deleted adapter's, between the two
                row, is_new = found
                return answer(adapter_of(row, who.tenant.name), 201 if is_new else 200)


def _add(conn: Connection, who: Caller, name: str, revision: NewRevision) -> tuple[Row[Any], bool] | None:
    """The adapter with this revision, and whether that is new. None where its files are gone again."""
    lock_usage(conn, who.tenant.id)
    _check_room(conn, who, name, num_bytes=revision.size_bytes, digest=revision.digest)
    hold_digest(conn, revision.digest)
    if not who.services.store.has(revision.digest):
        return None
    added, is_new = add_revision(conn, who.tenant.id, name, revision)
    who.note(conn, "adapter.upload", name, revision=public_id(REVISION, added), is_new=is_new)
    row = read_adapter(conn, name)
    assert row is not None
    return row, is_new


def _check_room(conn: Connection, who: Caller, name: str, *, num_bytes: int, digest: str | None = None) -> None:
    check_adapter_room(conn, who.tenant.id, who.tenant.quotas, name, num_bytes=num_bytes, digest=digest)


def _judge(upload: Upload, base: BaseModel) -> AdapterHeader:
    header, faults = check_upload(bytes(upload.config), upload.weights, base)
    if faults or header is None:
        raise InvalidRequest.of(faults)
    return header


def num_tiles(adapter: AdapterHeader, base: BaseModel) -> int:
    """Tiles that the adapter takes: of each projection group, its largest rank in steps of `TILE_RANKS`."""
    group_of = {site.name: site.group for site in linear_sites(base)}
    ranks: dict[str, int] = {}
    for target in adapter.targets:
        group = group_of[target.site]
        ranks[group] = max(ranks.get(group, 0), target.rank)
    return sum(-(-rank // TILE_RANKS) for rank in ranks.values())


@router.get("")
async def list_all(request: Request, who: Caller = Depends(reads)) -> Response:
    query = Query(request)
    limit = query.whole("limit", PAGE, low=1, high=MAX_PAGE)
    after = query.text("after")
    if after is not None and not NAME.fullmatch(after):
        query.refuse("after", "an adapter's name")
    query.end()
    rows = await who.services.sql.run(who.tenant.id, lambda conn: list_adapters(conn, after=after, limit=limit))
    adapters = [adapter_of(row, who.tenant.name) for row in rows]
    return answer({"adapters": adapters, "next": adapters[-1].name if len(adapters) == limit else None})


@router.get("/{name}")
async def read(name: str, request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    row = None
    if NAME.fullmatch(name):
        row = await who.services.sql.run(who.tenant.id, lambda conn: read_adapter(conn, name))
    if row is None:
        raise NotFound("adapter", name)
    return answer(adapter_of(row, who.tenant.name))


@router.delete("/{name}")
async def delete(name: str, request: Request, who: Caller = Depends(adapts)) -> Response:
    Query(request).end()

    def act(conn: Connection) -> bool:
        is_deleted = delete_adapter(conn, name)
        if is_deleted:
            who.note(conn, "adapter.delete", name)
        return is_deleted

    is_deleted = False
    if NAME.fullmatch(name):
        is_deleted = await who.services.sql.run(who.tenant.id, act)
    if not is_deleted:
        raise NotFound("adapter", name)
    return Response(status_code=204)
