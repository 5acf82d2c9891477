"""/openai/v1/models, and what a request's model means: the base by its name, or an adapter of the caller's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from sqlalchemy import Connection, Row

from medley.api.adapter_refs import Resolved, resolve_refs
from medley.api.auth import Caller, caller
from medley.api.decoding import Query
from medley.api.errors import ApiError
from medley.api.openai.shapes import Model, Page, answer
from medley.api.services import Services
from medley.db.adapters import list_revisions
from medley.db.tenants import Owner
from medley.spec.errors import Fault
from medley.spec.ids import REVISION, public_id

OWNER = "medley"

router = APIRouter(prefix="/openai/v1/models")


class ModelNotFound(ApiError):
    """The model does not exist, is another's, or may not run; `wanted` says which would."""

    status, code = 404, "model_not_found"

    def __init__(self, model: str, base_name: str, wanted: str = "an adapter of yours that exists") -> None:
        fault = Fault(field="model", got=repr(model)[:80], wanted=f"{base_name!r}, or {wanted}")
        super().__init__("there is no such model", [fault])


def resolve_models(conn: Connection, tenant: Owner, base_name: str, models: Iterable[str]) -> dict[str, Resolved]:
    """What each of `models` means. The base's own name means the base, whatever adapters are called."""
    named = set(models)
    found = resolve_refs(conn, tenant, named - {base_name})
    if base_name in named:
        found[base_name] = Resolved("", None)
    return found


@router.get("")
async def list_all(request: Request, who: Caller = Depends(caller)) -> Response:
    """The base, then each adapter by name, followed by its revisions."""
    Query(request).end()
    rows = await who.services.sql.run(who.tenant.id, list_revisions)
    models = [_base(who.services)]
    last = None
    for row in rows:
        if row.name != last:
            models.append(_adapter(row, row.name, who))
            last = row.name
        models.append(_adapter(row, f"{row.name}@{public_id(REVISION, row.revision_id)}", who))
    return answer(Page(models))


@router.get("/{model:path}")
async def read(model: str, request: Request, who: Caller = Depends(caller)) -> Response:
    Query(request).end()
    base_name = who.services.base_name
    if model == base_name:
        return answer(_base(who.services))

    def act(conn: Connection) -> Row[Any] | None:
        found = resolve_models(conn, who.tenant, base_name, [model])[model]
        if found.wanted is not None:
            return None
        return next((row for row in list_revisions(conn) if row.revision_id == found.revision), None)

    row = await who.services.sql.run(who.tenant.id, act)
    if row is None:
        raise ModelNotFound(model, base_name)
    return answer(_adapter(row, model, who))


def _base(services: Services) -> Model:
    name = services.base_name
    return Model(id=name, created=0, owned_by=OWNER, root=name, parent=None)


def _adapter(row: Row[Any], shown: str, who: Caller) -> Model:
    return Model(
        id=shown,
        created=int(row.created_at.timestamp()),
        owned_by=who.tenant.name,
        root=f"{row.name}@{public_id(REVISION, row.revision_id)}",
        parent=who.services.base_name,
    )
