"""The client on adapters: one folder, a folder of folders in parallel, skipping and resuming."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from api_server import ADAPTERS, Api

import medley
from medley.client import Client
from medley.client.adapters import Upload

NAMES = sorted(path.name for path in ADAPTERS.iterdir())[:8]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of eight adapters, and something else."""
    for name in NAMES:
        shutil.copytree(ADAPTERS / name, tmp_path / "adapters" / name)
    (tmp_path / "adapters" / "notes").mkdir()
    return tmp_path / "adapters"


def test_an_adapter_is_added_shown_and_deleted(client: Client, tenant: str) -> None:
    added = client.adapters.add("mine", ADAPTERS / NAMES[0])
    assert (added.name, added.full_name, added.state, added.num_revisions) == ("mine", f"{tenant}/mine", "ready", 1)
    assert client.adapters.get("mine") == added == client.adapters.add("mine", ADAPTERS / NAMES[0])
    other = client.adapters.add("mine", ADAPTERS / NAMES[1])
    assert other.num_revisions == 2
    assert other.revision != added.revision
    assert client.submit("x", adapter=f"mine@{added.revision}").status.revision == added.revision
    client.adapters.delete("mine")
    for ask in (client.adapters.get, client.adapters.delete):
        with pytest.raises(medley.NotFound, match="mine"):
            ask("mine")
    with pytest.raises(medley.InvalidRequest, match="adapter"):
        client.submit("x", adapter="mine")


def test_a_refused_adapter_has_all_its_reasons(client: Client, folder: Path) -> None:
    config = folder / NAMES[0] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "IA3", "use_dora": True}))
    with pytest.raises(medley.InvalidRequest) as raised:
        client.adapters.add("bad", folder / NAMES[0])
    assert {"adapter_config.peft_type", "adapter_config.use_dora"} <= {f.field for f in raised.value.faults}
    for name in ("-x", "a/b", "x" * 200):
        with pytest.raises((medley.InvalidRequest, medley.NotFound)):
            client.adapters.add(name, ADAPTERS / NAMES[1])
    with pytest.raises(FileNotFoundError):
        client.adapters.add("none", folder / "notes")


def test_a_folder_of_folders_goes_up_in_parallel_and_only_what_is_new_goes_again(client: Client, folder: Path) -> None:
    seen: list[Upload] = []
    uploads = client.adapters.add_folder(folder, parallel=4, on_upload=seen.append)
    assert [u.name for u in uploads] == NAMES
    assert sorted(seen, key=lambda u: u.name) == uploads
    assert not any(u.is_skipped or u.error for u in uploads)
    assert [a.name for a in client.adapters.list()] == NAMES
    shutil.copytree(ADAPTERS / NAMES[0], folder / NAMES[1], dirs_exist_ok=True)
    again = client.adapters.add_folder(folder)
    assert [u.name for u in again if not u.is_skipped] == [NAMES[1]]
    assert again[0].adapter == uploads[0].adapter
    assert client.adapters.get(NAMES[1]).num_revisions == 2


def test_one_bad_folder_does_not_stop_the_others(client: Client, folder: Path) -> None:
    weights = folder / NAMES[2] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    (folder / NAMES[3] / "adapter_model.safetensors").unlink()
    uploads = {u.name: u for u in client.adapters.add_folder(folder, parallel=2)}
    assert isinstance(uploads[NAMES[2]].error, medley.InvalidRequest)
    assert isinstance(uploads[NAMES[3]].error, FileNotFoundError)
    assert {name for name, u in uploads.items() if u.adapter} == set(NAMES) - {NAMES[2], NAMES[3]}
    with pytest.raises(FileNotFoundError, match="no sub-folder"):
        client.adapters.add_folder(folder / "notes")


def test_a_cut_upload_of_a_folder_goes_on_where_it_stood(
    client: Client, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_after_two(upload: Upload) -> None:
        done.append(upload.name)
        if len(done) == 2:
            is_cut.set()
            raise KeyboardInterrupt

    def add_until_cut(*args: Any, **kwargs: Any) -> Any:
        """Uploads that had begun when the interrupt came may end; those after them do not begin."""
        begun.append(args)
        if len(begun) > 3:
            is_cut.wait(60)
            raise OSError("interrupted")
        return add(*args, **kwargs)

    done: list[str] = []
    begun: list[Any] = []
    is_cut, add = threading.Event(), client.adapters.add
    with monkeypatch.context() as patch:
        patch.setattr(client.adapters, "add", add_until_cut)
        with pytest.raises(KeyboardInterrupt):
            client.adapters.add_folder(folder, parallel=1, on_upload=cut_after_two)
    present = {a.name for a in client.adapters.list()}
    assert set(done) <= present < set(NAMES)
    uploads = client.adapters.add_folder(folder)
    assert {u.name for u in uploads if u.is_skipped} == present
    assert {a.name for a in client.adapters.list()} == set(NAMES)


def test_a_long_list_is_read_page_by_page(
    api: Api, client: Client, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medley.client.adapters.PAGE", 2)
    for i in range(5):
        api.ledger.add_revision(api.tenant_id(tenant), f"a{i}")
    assert [a.name for a in client.adapters.list()] == [f"a{i}" for i in range(5)]


def test_an_adapter_is_shared_used_listed_and_unshared(api: Api, client: Client, tenant: str) -> None:
    added = client.adapters.add("mine", ADAPTERS / NAMES[0])
    with Client(api.url, api.key(f"friend-of-{tenant}")) as friend:
        grant = client.adapters.share("mine", f"friend-of-{tenant}")
        assert client.adapters.share("mine", f"friend-of-{tenant}") == grant
        assert list(client.adapters.grants("mine")) == [grant]
        assert [a.full_name for a in friend.adapters.list_shared()] == [f"{tenant}/mine"]
        assert friend.adapters.get(f"{tenant}/mine").revision == added.revision
        assert friend.submit("x", adapter=f"{tenant}/mine").status.revision == added.revision
        client.adapters.unshare("mine", f"friend-of-{tenant}")
        with pytest.raises(medley.NotFound):
            friend.adapters.get(f"{tenant}/mine")
        with pytest.raises(medley.InvalidRequest, match="adapter"):
            friend.submit("x", adapter=f"{tenant}/mine")
    with pytest.raises(medley.NotFound):
        client.adapters.unshare("mine", f"friend-of-{tenant}")
    with pytest.raises(medley.InvalidRequest, match="another tenant"):
        client.adapters.share("mine", "nobody")
