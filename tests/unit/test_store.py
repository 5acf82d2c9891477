"""A revision is in the store whole or not at all, under the digest of its two files, whoever writes it and when."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medley.objects import FolderObjects, ObjectCorrupt, UnsupportedStore
from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME
from medley.spec.revisions import RevisionHash, is_digest, revision_digest
from medley.store import Store, UnknownRevision, UnreadableUpload


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "store"))


def root_of(store: Store) -> Path:
    """The folder of a store that is local."""
    assert isinstance(store.objects, FolderObjects)
    return store.objects.root


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "upload"
    path.write_bytes(os.urandom(3_000_000))
    return path


def files_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_digest_is_sha256_over_both_files_with_their_lengths_before_them() -> None:
    framed = struct.pack("<Q", 2) + b"{}" + struct.pack("<Q", 3) + b"abc"
    assert revision_digest(b"{}", io.BytesIO(b"abc")) == hashlib.sha256(framed).hexdigest()


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 40))
def test_another_split_of_the_same_bytes_has_another_digest(config: bytes, data: bytes, cut: int) -> None:
    both = config + data
    cut = min(cut, len(both))
    same = revision_digest(both[:cut], io.BytesIO(both[cut:])) == revision_digest(config, io.BytesIO(data))
    assert same == (cut == len(config))


def test_a_length_that_was_not_kept_gives_no_digest() -> None:
    digest = RevisionHash(b"{}", 3)
    digest.update(b"ab")
    with pytest.raises(ValueError, match="differ by 1 bytes"):
        digest.hexdigest()


def test_what_was_put_is_found_by_its_digest_byte_for_byte(store: Store, weights: Path) -> None:
    digest = store.put(b'{"r": 4}', weights)
    with weights.open("rb") as file:
        assert digest == revision_digest(b'{"r": 4}', file)
    folder = store.path(digest)
    assert folder == root_of(store) / "sha256" / digest[:2] / digest
    assert (folder / CONFIG_NAME).read_bytes() == b'{"r": 4}'
    assert (folder / WEIGHTS_NAME).read_bytes() == weights.read_bytes()
    assert store.has(digest)


def test_putting_the_same_again_changes_nothing_and_leaves_nothing_behind(store: Store, weights: Path) -> None:
    digest = store.put(b"{}", weights)
    before = {path: path.stat().st_mtime_ns for path in files_under(root_of(store))}
    assert store.put(b"{}", weights) == digest
    assert {path: path.stat().st_mtime_ns for path in files_under(root_of(store))} == before
    assert list((root_of(store) / "tmp").iterdir()) == []
    assert store.put(b"{ }", weights) != digest


def test_many_writers_of_the_same_and_of_others_agree(store: Store, weights: Path) -> None:
    configs = [b'{"r": %d}' % (number % 4) for number in range(24)]
    found: list[str | None] = [None] * len(configs)
    start = threading.Barrier(len(configs))

    def write(number: int) -> None:
        start.wait()
        found[number] = store.put(configs[number], weights)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(configs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 4
    for config, digest in zip(configs, found, strict=True):
        assert digest is not None
        assert (store.path(digest) / CONFIG_NAME).read_bytes() == config
    assert len(files_under(root_of(store))) == 8


def test_a_writer_killed_at_any_moment_leaves_no_half_revision(store: Store, weights: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from medley.store import Store\n"
        "store = Store.open(sys.argv[1])\n"
        "for number in range(10**6):\n"
        "    print(store.put(b'%d' % number, Path(sys.argv[2])), flush=True)\n"
    )
    for num_lines in (1, 3, 5):
        command = [sys.executable, "-c", script, str(root_of(store)), str(weights)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            stored = [process.stdout.readline().strip() for _ in range(num_lines)]
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        for digest in stored:
            assert store.has(digest)
    for digest in store.digests():
        with (store.path(digest) / WEIGHTS_NAME).open("rb") as file:
            assert revision_digest((store.path(digest) / CONFIG_NAME).read_bytes(), file) == digest


def test_what_a_killed_put_left_is_forgotten_a_day_later_and_nothing_else_is(store: Store, weights: Path) -> None:
    assert store.forget_unfinished(older_than_s=60) == 0, "no put has ever been"
    digest = store.put(b"{}", weights)
    for name, age_s in (("old", 90), ("recent", 30)):
        file = root_of(store) / "tmp" / name
        file.write_bytes(b"half of i")
        os.utime(file, (time.time() - age_s,) * 2)
    for file in store.path(digest).iterdir():
        os.utime(file, (0, 0))
    assert store.forget_unfinished(older_than_s=60) == 1
    assert [file.name for file in (root_of(store) / "tmp").iterdir()] == ["recent"]
    assert store.has(digest)


@pytest.mark.parametrize(
    "digest", ["", "0" * 63, "0" * 65, "A" * 64, "../" * 21 + "a", "0" * 64 + "\n", "0" * 63 + "\x00", "٣" * 64]
)
def test_what_is_no_digest_never_becomes_a_path(store: Store, digest: str) -> None:
    assert not is_digest(digest)
    assert not store.has(digest)
    with pytest.raises(UnknownRevision, match="is not a revision's digest"):
        store.path(digest)


def test_an_absent_revision_is_named(store: Store, weights: Path) -> None:
    with pytest.raises(UnknownRevision, match="0" * 64):
        store.path("0" * 64)
    digest = store.put(b"{}", weights)
    elsewhere = root_of(store) / "elsewhere"
    shutil.move(store.path(digest), elsewhere)
    (root_of(store) / "sha256" / digest[:2] / digest).symlink_to(elsewhere)
    assert not store.has(digest)


def test_only_a_plain_file_is_taken_as_weights(tmp_path: Path, store: Store, weights: Path) -> None:
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(weights)
    os.mkfifo(pipe)
    for path in (link, pipe, tmp_path, tmp_path / "absent"):
        with pytest.raises(UnreadableUpload, match=path.name):
            store.put(b"{}", path)
    assert files_under(root_of(store)) == []


def test_what_was_deleted_is_gone_and_can_be_put_again(store: Store, weights: Path) -> None:
    digest = store.put(b"{}", weights)
    store.delete(digest)
    store.delete(digest)
    assert not store.has(digest)
    assert list(store.digests()) == []
    assert files_under(root_of(store)) == []
    assert store.put(b"{}", weights) == digest
    assert list(store.digests()) == [digest]


def test_what_was_damaged_in_the_store_is_not_fetched(tmp_path: Path, store: Store, weights: Path) -> None:
    digest = store.put(b"{}", weights)
    for number, change in enumerate((b"", b"another file", weights.read_bytes()[:-1] + b"!")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (store.path(digest) / WEIGHTS_NAME).write_bytes(change)
        with pytest.raises(ObjectCorrupt, match=digest):
            store.fetch(digest, folder)
    with pytest.raises(UnknownRevision, match="0" * 64):
        store.fetch("0" * 64, tmp_path)


def test_a_store_is_a_folder_or_a_file_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert root_of(Store.open("adapters")) == tmp_path / "adapters"
    assert root_of(Store.open("/srv/a b")) == Path("/srv/a b")
    assert root_of(Store.open("file:///srv/a%20b")) == Path("/srv/a b")
    assert root_of(Store.open("file://localhost/srv")) == Path("/srv")


@pytest.mark.parametrize("url", ["gs://b", "https://host/x", "ftp://x"])
def test_another_scheme_is_refused_by_name(url: str) -> None:
    with pytest.raises(UnsupportedStore, match=f"'{url.split(':')[0].lower()}'"):
        Store.open(url)


@pytest.mark.parametrize("url", ["", "file:relative", "file://host/srv", "file:///srv?x=1", "file:///srv#x"])
def test_a_file_url_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(UnsupportedStore):
        Store.open(url)
