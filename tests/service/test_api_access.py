"""Who may do what: every route as anonymous, expired, revoked, without the scope, and as another tenant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from api_server import Api, adapter_files
from fastapi.routing import APIRoute, iter_route_contexts
from openai_service import client_of, close_clients, completion_line, create
from sqlalchemy import text

from medley.api.app import create_app
from medley.api.auth import DECLARED
from medley.config import Limits, Settings
from medley.db.keys import NewKey, add_key
from medley.spec.scopes import Scope

LIMITS = Limits()


@dataclass
class World:
    """Two tenants; the first has one of everything. `paths` fills a route's parameters with what it has."""

    api: Api
    paths: dict[str, str] = field(default_factory=dict)
    dead_keys: list[str | None] = field(default_factory=list)

    def ask(self, key: str | None, route: Route) -> httpx.Response:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return self.api.anonymous.request(route.method, self.path(route), headers=headers)

    def key(self, *scopes: Scope, tenant: str = "acme") -> str:
        new = NewKey.draw()
        owner_of = self.api.tenant_id(tenant)
        self.api.owner(lambda conn: add_key(conn, owner_of, new, scopes=scopes))
        return new.text

    def path(self, route: Route) -> str:
        return route.path.format(**self.paths)


@dataclass(frozen=True)
class Route:
    method: str
    path: str
    scope: Scope | None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def names_something(self) -> bool:
        """Whether the path holds an id or a name of a tenant's."""
        return "{" in self.path


def _routes() -> list[Route]:
    app = create_app(Settings(database_url="", redis_url="", store_url="", model=None))
    found = []
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        assert isinstance(route, APIRoute), f"{route}: wants to declare its scope"
        declared = [DECLARED[d.call] for d in route.dependant.dependencies if d.call in DECLARED]
        assert len(declared) == 1, f"{route.path}: wants exactly one of the dependencies of medley.api.auth"
        found += [Route(method, route.path.replace(":path}", "}"), declared[0]) for method in sorted(route.methods)]
    return found


ROUTES = _routes()
CLOSED = [route for route in ROUTES if route.scope is not None]
by_name = pytest.mark.parametrize("route", CLOSED, ids=str)


@pytest.fixture(scope="module")
def world(api: Api) -> World:
    made = World(api)
    acme, _, _ = (api.as_tenant(name) for name in ("acme", "globex", "initech"))
    assert acme.put("/v1/adapters/mine", files=adapter_files()).status_code == 201
    assert acme.post("/v1/adapters/mine/grants", json={"tenant": "initech"}).status_code == 201
    job = acme.post("/v1/jobs", json={"prompt": "a", "adapter": "mine"}).json()
    sweep = acme.post("/v1/sweeps", json={"name": "s", "prompts": ["a"], "include_base": True}).json()
    key = acme.post("/v1/keys", json={"name": "one"}).json()
    webhook = acme.post("/v1/webhooks", json={"url": "https://example.com", "events": ["batch.finished"]}).json()
    batch = create(client_of(api, "acme"), [completion_line("1")])
    close_clients()
    made.paths = {
        "name": "mine",
        "owner": "acme",
        "tenant": "initech",
        "job_id": job["id"],
        "batch_id": batch.id,
        "file_id": batch.input_file_id,
        "model": "mine",
        "sweep_id": sweep["id"],
        "key_id": key["id"],
        "webhook_id": webhook["id"],
    }
    revoked, expired = made.key(*Scope), made.key(*Scope)
    for ended, ending in ((revoked, "revoked_at"), (expired, "expires_at")):
        statement = text(f"UPDATE api_keys SET {ending} = clock_timestamp() WHERE id = :id")
        api.owner(lambda conn, s=statement, key=ended: conn.execute(s, {"id": key.split("_")[1]}))
    wrong_secret = f"{made.key(*Scope)[:-1]}!"
    made.dead_keys = [None, revoked, expired, wrong_secret, "mk_00000000_" + "a" * 43, "x" * 500]
    return made


def test_only_health_is_open() -> None:
    described = {"/openapi.json", "/docs", "/docs/{name}"}
    assert {route.path for route in ROUTES if route.scope is None} == {"/livez", "/readyz"} | described


def test_every_parameter_of_a_path_is_known_to_these_tests(world: World) -> None:
    for route in CLOSED:
        world.path(route)


def test_what_changes_something_wants_more_than_to_read() -> None:
    assert [str(route) for route in CLOSED if route.method != "GET" and route.scope is Scope.READ] == []


@by_name
def test_without_a_key_that_lives_a_route_is_closed(world: World, route: Route) -> None:
    for key in world.dead_keys:
        response = world.ask(key, route)
        assert response.status_code == 401, (route, key)
        assert response.json()["error"]["code"] == "unauthorized"
        assert "Bearer" in response.headers["www-authenticate"]


@by_name
def test_a_key_of_every_other_scope_is_refused_with_the_scope_that_is_wanted(world: World, route: Route) -> None:
    assert route.scope is not None
    others = [scope for scope in Scope if scope not in (route.scope, Scope.ADMIN)]
    key = world.key(*others)
    response = world.ask(key, route)
    assert response.status_code == 403
    error = response.json()["error"]
    assert error["code"] == "wrong_scope"
    assert f"scope {route.scope.value};" in error["message"]
    assert key.split("_", 2)[2] not in response.text
    assert world.api.as_tenant("acme").get(f"/v1/jobs/{world.paths['job_id']}").json()["state"] == "queued"


@by_name
def test_a_key_of_its_scope_or_of_admin_alone_is_let_in(world: World, route: Route) -> None:
    assert route.scope is not None
    for scope in {route.scope, Scope.ADMIN}:
        assert world.ask(world.key(scope, tenant="globex"), route).status_code not in (401, 403)


# A name that nobody of the tenant has is free to be taken by PUT.
@pytest.mark.parametrize("route", [r for r in CLOSED if r.names_something and r.method != "PUT"], ids=str)
def test_what_another_tenant_names_does_not_exist(world: World, route: Route) -> None:
    response = world.api.as_tenant("globex").request(route.method, world.path(route))
    assert response.status_code == 404, response.text
    assert response.json()["error"]["code"] in ("not_found", "model_not_found")


def test_nothing_of_the_first_tenant_has_changed_after_all_that(world: World) -> None:
    acme = world.api.as_tenant("acme")
    assert acme.get(f"/v1/jobs/{world.paths['job_id']}").json()["state"] == "queued"
    assert [a["name"] for a in acme.get("/v1/adapters").json()["adapters"]] == ["mine"]
    assert acme.get(f"/v1/keys/{world.paths['key_id']}").json()["state"] == "live"
    globex = world.api.as_tenant("globex")
    listings: dict[str, Any] = {
        path: globex.get(path).json() for path in ("/v1/batches", "/v1/sweeps", "/v1/adapters", "/v1/audit")
    }
    assert [
        found
        for page in listings.values()
        for values in page.values()
        if isinstance(values, list)
        for found in values
        if "mine" in str(found) or world.paths["job_id"] in str(found)
    ] == []
