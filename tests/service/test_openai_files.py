"""Files by the real `openai` client: stored whole, listed by page, read in parts, deleted, forgotten with time."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import openai
import pytest
from api_server import Api
from openai_service import client_of, close_clients, completion_line, create, make_tasks, upload
from sqlalchemy import text

from medley.config import Limits
from medley.db.files import object_prefix
from medley.db.retention import set_retention
from medley.objects import Objects
from medley.store import Store
from medley.tasks.maintain import maintain

LIMITS = Limits(max_body_bytes=1 << 16, max_file_bytes=8 << 20)
DATA = bytes(range(256)) * 1000


@pytest.fixture(autouse=True)
def _own_tenant(api: Api) -> Iterator[None]:
    api.take_new_tenant()
    yield
    close_clients()


def name_of_tenant(api: Api) -> str:
    return str(api.as_tenant().get("/v1/tenant").json()["name"])


def stored(api: Api) -> list[str]:
    """The files of the default tenant that have bytes in the store."""
    prefix = object_prefix(api.tenant_id(name_of_tenant(api)))
    return [f"file_{key.removeprefix(prefix)}" for key in Objects.open(api.settings.store_url).keys(prefix)]


def test_a_file_is_stored_as_it_was_sent(api: Api) -> None:
    client = client_of(api)
    data = os.urandom(5 << 20)
    file = client.files.create(file=("näme.jsonl", data), purpose="batch")
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(data), "näme.jsonl", "batch")
    assert file.status == "processed"
    assert file.expires_at - file.created_at == 30 * 24 * 3600
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).content == data
    with client.files.with_streaming_response.content(file.id) as response:
        assert hashlib.sha256(b"".join(response.iter_bytes())).hexdigest() == hashlib.sha256(data).hexdigest()
        assert response.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'


def test_an_equal_upload_with_one_key_is_one_file_and_one_that_was_cut_is_gone_on_with(api: Api) -> None:
    client = client_of(api)

    def send(data: bytes) -> str:
        headers = {"Idempotency-Key": "once"}
        return client.files.create(file=("input.jsonl", data), purpose="batch", extra_headers=headers).id

    first = send(DATA)
    assert send(DATA) == first
    with pytest.raises(openai.ConflictError):
        send(DATA[1:])
    with api.ledger.working() as conn:
        cut = text("UPDATE files SET stored_at = NULL WHERE id = :id")
        conn.execute(cut, {"id": UUID(first.removeprefix("file_"))})
    assert send(DATA) == first
    assert client.files.content(first).content == DATA
    client.files.delete(first)
    with pytest.raises(openai.NotFoundError):
        send(DATA)


def test_a_download_that_was_cut_goes_on_where_it_stood(api: Api) -> None:
    file = upload(client_of(api), DATA)
    http = api.as_tenant()
    url = f"/openai/v1/files/{file}/content"
    whole = http.get(url)
    for asked, start, end in (
        ("bytes=0-9", 0, 10),
        ("bytes=1000-", 1000, len(DATA)),
        ("bytes=-5", len(DATA) - 5, len(DATA)),
        (f"bytes=255990-{10**9}", 255_990, len(DATA)),
    ):
        part = http.get(url, headers={"Range": asked, "If-Range": whole.headers["etag"]})
        assert part.status_code == 206
        assert part.content == DATA[start:end]
        assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{len(DATA)}"
    assert http.get(url, headers={"Range": "bytes=5-", "If-Range": '"other"'}).content == DATA
    assert http.get(url, headers={"Range": "lines=1-2"}).content == DATA
    beyond = http.get(url, headers={"Range": "bytes=999999999-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(DATA)}")


def test_files_are_listed_page_by_page_in_either_order(api: Api) -> None:
    client = client_of(api)
    made = [upload(client, [completion_line(str(i))]) for i in range(5)]
    assert [file.id for file in client.files.list()] == made[::-1]
    assert [file.id for file in client.files.list(order="asc", limit=2)] == made, "their client turns the pages"
    page = client.files.list(order="asc", limit=2, after=made[1])
    assert [file.id for file in page.data] == made[2:4]
    assert page.has_more
    assert list(client.files.list(purpose="batch_output")) == []


def test_a_deleted_file_is_gone_and_its_bytes_go(api: Api) -> None:
    client = client_of(api)
    file, kept = upload(client, DATA), upload(client, DATA)
    assert client.files.delete(file).deleted
    for gone in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            gone(file)
    maintain(api.ledger.work, Store.open(api.settings.store_url))
    assert stored(api) == [kept]


def test_an_expired_file_and_one_that_was_never_finished_are_forgotten(api: Api) -> None:
    client = client_of(api)
    expired = upload(client, DATA, expires_after={"anchor": "created_at", "seconds": 3600})
    cut, fresh = upload(client, DATA), upload(client, DATA)

    def ids(*shown: str) -> list[UUID]:
        return [UUID(one.removeprefix("file_")) for one in shown]

    with api.ledger.working() as conn:
        (id_,) = ids(expired)
        conn.execute(text("UPDATE files SET expires_at = clock_timestamp() WHERE id = :id"), {"id": id_})
        old = "UPDATE files SET stored_at = NULL, created_at = created_at - interval '25 hours' WHERE id = :id"
        conn.execute(text(old), {"id": ids(cut)[0]})
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(expired)
    maintain(api.ledger.work, Store.open(api.settings.store_url))
    with api.ledger.working() as conn:
        statement = text("SELECT id FROM files WHERE id = ANY(:ids)")
        assert list(conn.execute(statement, {"ids": ids(expired, cut, fresh)}).scalars()) == ids(fresh)


def test_files_and_batches_go_with_their_tenants_days(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("1")])
    make_tasks(api).look()
    api.finish(batch.id)
    make_tasks(api).look()
    output = client.batches.retrieve(batch.id).output_file_id
    assert output is not None
    fresh = upload(client, DATA)
    aged = "UPDATE {} SET {} = {} - interval '10 days' WHERE id = ANY(:ids)"
    with api.ledger.working() as conn:
        files = [UUID(id_.removeprefix("file_")) for id_ in (batch.input_file_id, output)]
        conn.execute(text(aged.format("files", *["created_at"] * 2)), {"ids": files})
        conn.execute(
            text(aged.format("batches", *["finished_at"] * 2)), {"ids": [UUID(batch.id.removeprefix("batch_"))]}
        )
    assert client.files.retrieve(output).id == output
    name = name_of_tenant(api)
    api.owner(lambda conn: set_retention(conn, name, 7))
    assert [file.id for file in client.files.list()] == [fresh]
    for gone in (lambda: client.files.content(output), lambda: client.batches.retrieve(batch.id)):
        with pytest.raises(openai.NotFoundError):
            gone()
    assert list(client.batches.list()) == []
    maintain(api.ledger.work, Store.open(api.settings.store_url))
    assert stored(api) == [fresh]
    with api.ledger.working() as conn:
        for table in ("openai_batches", "openai_batch_models", "batches"):
            statement = text(f"SELECT count(*) FROM {table} WHERE tenant_id = :id")
            assert conn.execute(statement, {"id": api.tenant_id(name)}).scalar_one() == 0, table


def test_the_input_of_a_batch_that_still_reads_it_is_kept_though_deleted(api: Api) -> None:
    client = client_of(api)
    batch = create(client, [completion_line("1")])
    client.files.delete(batch.input_file_id)
    maintain(api.ledger.work, Store.open(api.settings.store_url))
    make_tasks(api).look()
    assert client.batches.retrieve(batch.id).status == "in_progress"
    api.finish(batch.id)


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ({"files": {"purpose": (None, b"batch")}}, ["file"]),
        ({"data": {"purpose": "fine-tune", "colour": "red"}, "files": {"file": b"x"}}, ["colour", "purpose"]),
        ({"data": {"purpose": "batch"}, "files": {"file": b"x", "other": b"y"}}, []),
        ({"data": {"purpose": "batch", "expires_after[seconds]": "5"}, "files": {"file": b"x"}}, None),
        ({"data": {"purpose": "x" * 10_000}, "files": {"file": b"x"}}, []),
        ({"content": b"--x\r\n\r\n", "headers": {"Content-Type": "multipart/form-data"}}, []),
        ({"json": {"purpose": "batch"}}, ["Content-Type"]),
    ],
)
def test_a_form_that_is_not_one_file_for_a_batch_is_refused(
    api: Api, form: dict[str, Any], fields: list[str] | None
) -> None:
    response = api.as_tenant().post("/openai/v1/files", **form)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    wanted = ["expires_after[anchor]", "expires_after[seconds]"] if fields is None else fields
    assert [fault["field"] for fault in error.get("faults", [])] == wanted
    assert list(client_of(api).files.list()) == []


def test_a_file_beyond_the_limit_is_refused_and_nothing_is_kept(api: Api) -> None:
    client = client_of(api)
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("big", io.BytesIO(bytes(LIMITS.max_file_bytes + 1))), purpose="batch")
    assert caught.value.status_code == 413
    assert list(client.files.list()) == []
