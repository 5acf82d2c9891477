"""/v1/adapters: upload, list, read, delete. An upload is judged whole before anything is stored."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row

from medley.api.auth import Caller, caller
from medley.api.decoding import Query
from medley.api.errors import InvalidRequest, NotFound, NotReady
from medley.api.services import Services
from medley.api.shapes import adapter_of, answer
from medley.api.uploads import Upload
from medley.db.adapters import NAME, NewRevision, add_revision, delete_adapter, list_adapters, read_adapter
from medley.spec.adapters import AdapterHeader
from medley.spec.base_models import BaseModel, linear_sites
from medley.spec.errors import Fault
from medley.spec.intake import check_upload
from medley.spec.strict_json import shown_name

MAX_PAGE = 10_000
PAGE = 1_000
TILE_RANKS = 8  # ranks of one projection group, over all layers, in a tile of device memory

router = APIRouter(prefix="/v1/adapters")


@router.put("/{name}")
async def put(name: str, request: Request, who: Caller = Depends(caller)) -> Response:
    """201 for a new revision, 200 where the same files were there. Raises InvalidRequest with every reason."""
    Query(request).end()
    if not NAME.fullmatch(name):
        wanted = "1 to 128 letters, digits, dots, dashes or underscores, a letter or digit first"
        raise InvalidRequest.of([Fault(field="name", got=shown_name(name), wanted=wanted)])
    services = who.services
    base = services.base
    if base is None:
        raise NotReady("this service was started without a base model (MEDLEY_MODEL), so adapters cannot be judged")
    with Upload(services.settings.limits.max_adapter_bytes) as upload:
        await upload.receive(request)
        revision = await services.sql.call(lambda: _store(services, upload, base))

    def act(conn: Connection) -> tuple[Row[Any] | None, bool]:
        _, is_new = add_revision(conn, who.tenant.id, name, revision)
        return read_adapter(conn, name), is_new

    row, is_new = await services.sql.run(who.tenant.id, act)
    assert row is not None
    return answer(adapter_of(row, who.tenant.name), 201 if is_new else 200)


def _store(services: Services, upload: Upload, base: BaseModel) -> NewRevision:
    config = bytes(upload.config)
    header, faults = check_upload(config, upload.weights, base)
    if faults or header is None:
        raise InvalidRequest.of(faults)
    digest = services.store.put(config, upload.weights_path)
    return NewRevision(digest, header.max_rank, num_tiles(header, base), len(config) + header.size_bytes)


def num_tiles(adapter: AdapterHeader, base: BaseModel) -> int:
    """Tiles that the adapter takes: of each projection group, its largest rank in steps of `TILE_RANKS`."""
    group_of = {site.name: site.group for site in linear_sites(base)}
    ranks: dict[str, int] = {}
    for target in adapter.targets:
        group = group_of[target.site]
        ranks[group] = max(ranks.get(group, 0), target.rank)
    return sum(-(-rank // TILE_RANKS) for rank in ranks.values())


@router.get("")
async def list_all(request: Request, who: Caller = Depends(caller)) -> Response:
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
async def read(name: str, request: Request, who: Caller = Depends(caller)) -> Response:
    Query(request).end()
    row = None
    if NAME.fullmatch(name):
        row = await who.services.sql.run(who.tenant.id, lambda conn: read_adapter(conn, name))
    if row is None:
        raise NotFound("adapter", name)
    return answer(adapter_of(row, who.tenant.name))


@router.delete("/{name}")
async def delete(name: str, request: Request, who: Caller = Depends(caller)) -> Response:
    Query(request).end()
    is_deleted = False
    if NAME.fullmatch(name):
        is_deleted = await who.services.sql.run(who.tenant.id, lambda conn: delete_adapter(conn, name))
    if not is_deleted:
        raise NotFound("adapter", name)
    return Response(status_code=204)
