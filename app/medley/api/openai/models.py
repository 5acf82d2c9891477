"""/openai/v1/models, and what a request's model means: the base by its name, or an adapter that the caller may use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row

from medley.api.adapter_refs import Resolved, resolve_refs
from medley.api.auth import Caller, reads
from medley.api.decoding import Query
from medley.api.errors import ApiError
from medley.api.openai.shapes import Model, Page
from medley.api.services import Services
from medley.api.shapes import answer
from medley.db.adapters import list_revisions, read_made_at
from medley.db.grants import list_shared_revisions
from medley.spec.errors import Fault
from medley.spec.ids import REVISION, public_id

OWNER = "medley"  # of the base

router = APIRouter(prefix="/openai/v1/models")


class ModelNotFound(ApiError):
    """The model does not exist, is another's, or may not run; `wanted` says which would."""

    status, code = 404, "model_not_found"

    def __init__(self, model: str, base_name: str, wanted: str = "an adapter of yours that exists") -> None:
        fault = Fault(field="model", got=repr(model)[:80], wanted=f"{base_name!r}, or {wanted}")
        super().__init__("there is no such model", [fault])


def resolve_models(conn: Connection, caller: str, base_name: str, models: Iterable[str]) -> dict[str, Resolved]:
    """What each of `models` means. The base's own name means the base, whatever adapters are called.

    caller: the name of the transaction's tenant.
    """
    named = set(models)
    found = resolve_refs(conn, caller, named - {base_name})
    if base_name in named:
        found[base_name] = Resolved("", None)
    return found


@router.get("")
async def list_all(request: Request, who: Caller = Depends(reads)) -> Response:
    """The base, then each adapter by name, the caller's own first, followed by its revisions."""
    Query(request).end()
    adapters = await who.services.sql.run(who.tenant.id, lambda conn: _read(conn, who))
    return answer(Page([_base(who.services), *adapters]))


@router.get("/{model:path}")
async def read(model: str, request: Request, who: Caller = Depends(reads)) -> Response:
    Query(request).end()
    base_name = who.services.base_name
    if model == base_name:
        return answer(_base(who.services))

    def act(conn: Connection) -> Model | None:
        found = resolve_models(conn, who.tenant.name, base_name, [model])[model]
        if found.revision is None:
            return None
        made_at = read_made_at(conn, found.revision)
        return None if made_at is None else _adapter(who, model, model.partition("@")[0], found.revision, made_at)

    found = await who.services.sql.run(who.tenant.id, act)
    if found is None:
        raise ModelNotFound(model, base_name)
    return answer(found)


def _read(conn: Connection, who: Caller) -> list[Model]:
    """Every adapter that may run, and every revision of it; a bare name means the newest."""
    named = [(row.name, row) for row in list_revisions(conn)]
    named += [(f"{row.owner}/{row.name}", row) for row in list_shared_revisions(conn)]
    return [
        model
        for name, group in groupby(named, lambda item: item[0])
        for model in _models(who, name, [r for _, r in group])
    ]


def _models(who: Caller, name: str, rows: Sequence[Row[Any]]) -> list[Model]:
    """Of one adapter; rows: its revisions, the newest first."""
    fit = [row for row in rows if row.quarantined_at is None]
    pinned = [(f"{name}@{public_id(REVISION, row.revision_id)}", row) for row in fit]
    bare = [(name, row) for row in rows[:1] if row.quarantined_at is None]
    return [_adapter(who, shown, name, row.revision_id, row.revised_at) for shown, row in bare + pinned]


def _base(services: Services) -> Model:
    name = services.base_name
    return Model(id=name, created=0, owned_by=OWNER, root=name, parent=None)


def _adapter(who: Caller, shown: str, name: str, revision: UUID, made_at: datetime) -> Model:
    """name: as the caller may write it, perhaps with its owner."""
    owner, _, _ = name.rpartition("/")
    return Model(
        id=shown,
        created=int(made_at.timestamp()),
        owned_by=owner or who.tenant.name,
        root=f"{name}@{public_id(REVISION, revision)}",
        parent=who.services.base_name,
    )
