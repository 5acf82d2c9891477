"""Models by the real `openai` client, and its exceptions: each refusal of the service is the one that it knows."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from api_server import Api
from openai_service import client_of, close_clients

from medley.api.auth import reads
from medley.api.errors import ApiError
from medley.config import Limits

LIMITS = Limits(max_body_bytes=1 << 20)


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> Iterator[None]:
    api.take_new_tenant()
    yield
    close_clients()


def test_models_are_the_base_and_the_callers_adapters_with_their_revisions(api: Api) -> None:
    client = client_of(api)
    api.upload("mine")
    api.upload("mine", folder="upper")
    api.upload("also")
    newest = api.as_tenant().get("/v1/adapters/mine").json()["revision"]
    listed = [model.id for model in client.models.list()]
    assert listed[:2] == ["model", "also"]
    assert listed[3:5] == ["mine", f"mine@{newest}"]
    assert len(listed) == 6
    tenant = api.as_tenant().get("/v1/tenant").json()["name"]
    for name in (*listed, f"{tenant}/mine"):
        assert client.models.retrieve(name).id == name
    assert client.models.retrieve("mine").model_dump()["root"] == f"mine@{newest}"
    for name in ("nobody", "mine@rev_" + "0" * 32, "stranger/mine"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve(name)
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=name, prompt="x")


def test_errors_are_those_that_their_client_knows(api: Api) -> None:
    with pytest.raises(openai.AuthenticationError):
        client_of(api).with_options(api_key="mk_no").models.list()
    with pytest.raises(openai.NotFoundError):
        client_of(api).embeddings.create(model="model", input="x")
    with pytest.raises(openai.APIStatusError) as caught:
        client_of(api).completions.create(model="model", prompt="x" * LIMITS.max_body_bytes)
    assert (caught.value.status_code, caught.value.code) == (413, "too_large")
    response = api.as_tenant().post("/openai/v1/completions", content=b"{", headers={"x": "y"})
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert response.headers.get_list("x-request-id") == [response.headers["x-request-id"]]
    packed = api.as_tenant().post("/openai/v1/completions", content=b"x", headers={"Content-Encoding": "gzip"})
    assert (packed.status_code, packed.json()["error"]["type"]) == (415, "invalid_request_error")


def test_a_shared_adapter_is_listed_by_its_owners_name_after_the_callers_own(api: Api) -> None:
    owner = api.take_new_tenant()
    api.upload("zeta")
    api.upload("kept")
    caller = api.take_new_tenant()
    api.upload("mine")
    assert [model.id for model in client_of(api).models.list()][1::2] == ["mine"]
    api.as_tenant(owner).post("/v1/adapters/zeta/grants", json={"tenant": caller})
    client = client_of(api)
    names = [model.id for model in client.models.list()]
    assert [name.partition("@")[0] for name in names] == ["model", "mine", "mine", f"{owner}/zeta", f"{owner}/zeta"]
    for name in names:
        assert client.models.retrieve(name).id == name
    assert client.models.retrieve(f"{owner}/zeta").owned_by == owner
    for hidden in (f"{owner}/kept", "zeta"):
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(hidden)


@pytest.mark.parametrize(
    ("status", "code", "raised"),
    [
        (403, "forbidden", openai.PermissionDeniedError),
        (422, "invalid_request", openai.UnprocessableEntityError),
        (429, "rate_limited", openai.RateLimitError),
        (503, "not_ready", openai.InternalServerError),
    ],
)
def test_a_refusal_of_any_kind_is_an_error_of_theirs(
    api: Api, status: int, code: str, raised: type[openai.APIStatusError]
) -> None:
    client = client_of(api)

    def refuse() -> None:
        error = ApiError("not now", headers={"Retry-After": "7"})
        error.status, error.code = status, code
        raise error

    api._app.dependency_overrides[reads] = refuse
    try:
        with pytest.raises(raised) as caught:
            client.models.list()
    finally:
        api._app.dependency_overrides.clear()
    assert (caught.value.code, caught.value.response.headers["retry-after"]) == (code, "7")
    assert "not now" in caught.value.message
