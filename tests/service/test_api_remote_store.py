"""Uploads to an S3-compatible store through the API: there or not, whatever the store does meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_server import ADAPTERS, Api, running_api
from bad_line import Fate
from openai_service import client_of, close_clients, completion_line, create, make_tasks, read_lines
from s3_server import S3Server, running_s3
from sqlalchemy import text

from medley import objects_s3
from medley.local.embedded import EmbeddedServers
from medley.spec.revisions import revision_digest
from medley.store import Store
from medley.tasks.maintain import maintain


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as server, pytest.MonkeyPatch.context() as patch:
        for key, value in server.environ().items():
            patch.setenv(key, value)
        patch.setattr(objects_s3, "MAX_TRIES", 2)
        yield server


@pytest.fixture(scope="module")
def remote(s3: S3Server, module_database: Any, embedded: EmbeddedServers) -> Iterator[Api]:
    with running_api(module_database, embedded.redis_url, s3.new_url()) as api:
        yield api


def test_an_upload_lies_in_the_store_under_its_digest(remote: Api) -> None:
    made = remote.upload("add")
    assert made.status_code == 201, made.text
    store = Store.open(remote.settings.store_url)
    with (ADAPTERS / "add/adapter_model.safetensors").open("rb") as weights:
        digest = revision_digest((ADAPTERS / "add/adapter_config.json").read_bytes(), weights)
    assert list(store.digests()) == [digest] == [made.json()["digest"]]
    assert remote.upload("add").status_code == 200
    assert remote.upload("again").json()["digest"] == digest


def test_a_store_that_is_away_answers_503_and_leaves_no_adapter(remote: Api, s3: S3Server) -> None:
    s3.is_down = True
    try:
        refused = remote.upload("away", folder="caesar-3")
    finally:
        s3.is_down = False
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
    assert refused.headers["retry-after"]
    assert "127.0.0.1" not in refused.text
    assert remote.as_tenant().get("/v1/adapters/away").status_code == 404
    with remote.ledger.working() as conn:
        assert conn.execute(text("SELECT count(*) FROM adapters WHERE name = 'away'")).scalar_one() == 0
    assert remote.as_tenant().get("/v1/tenant").status_code == 200
    assert remote.upload("away", folder="caesar-3").status_code == 201


def test_a_store_that_stumbles_is_asked_again(remote: Api, s3: S3Server) -> None:
    s3.fates += [Fate.AWAY, Fate.SLOW, Fate.DROPPED]
    assert remote.upload("stumbled", folder="affine-5-8").status_code == 201
    assert s3.num_uploads() == 0


def test_files_lie_in_the_store_and_a_batch_reads_and_writes_them_there(remote: Api, s3: S3Server) -> None:
    client = client_of(remote)
    batch = create(client, [completion_line("1")])
    s3.is_down = True
    try:
        refused = remote.as_tenant().get(f"/openai/v1/files/{batch.input_file_id}/content")
        make_tasks(remote).look()
        cut = remote.as_tenant().post("/openai/v1/files", files={"file": b"{}"}, data={"purpose": "batch"})
    finally:
        s3.is_down = False
    for answer in (refused, cut):
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    with remote.ledger.working() as conn:
        assert conn.execute(text("SELECT count(*) FROM files WHERE deleted_at IS NULL")).scalar_one() == 1
    assert client.batches.retrieve(batch.id).status == "validating", "its step comes again"
    with remote.ledger.working() as conn:
        conn.execute(text("UPDATE openai_batches SET due_at = clock_timestamp()"))
    tasks = make_tasks(remote)
    tasks.look()
    remote.finish(batch.id, text="done")
    tasks.look()
    ended = client.batches.retrieve(batch.id)
    assert [line["custom_id"] for line in read_lines(client, ended.output_file_id)] == ["1"]
    part = remote.as_tenant().get(f"/openai/v1/files/{ended.output_file_id}/content", headers={"Range": "bytes=1-3"})
    assert (part.status_code, len(part.content)) == (206, 3)
    for file in client.files.list():
        client.files.delete(file.id)
    close_clients()
    store = Store.open(remote.settings.store_url)
    maintain(remote.ledger.work, store)
    assert list(store.objects.keys("files/")) == []
