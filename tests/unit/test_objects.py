"""A blob is there whole or not at all, in a folder and in a real S3-compatible store alike, whatever fails."""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_line import Fate
from s3_server import BUCKET, S3Server, running_s3

from medley import objects_s3
from medley.config import store_access_from_env
from medley.environment import ConfigError
from medley.objects import FolderObjects, ObjectCorrupt, ObjectMissing, Objects, StoreUnavailable, UnsupportedStore


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as server:
        yield server


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects_s3, "PART_BYTES", 5 << 20)  # S3's least
    monkeypatch.setattr(objects_s3, "MAX_TRIES", 2)


@pytest.fixture
def remote(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Objects]:
    for key, value in s3.environ().items():
        monkeypatch.setenv(key, value)
    yield Objects.open(s3.new_url())
    s3.fates.clear()
    s3.is_down = False


@pytest.fixture
def folder(tmp_path: Path) -> Objects:
    return Objects.open((tmp_path / "objects").as_uri())


@pytest.fixture(params=["folder", "remote"])
def objects(request: pytest.FixtureRequest) -> Objects:
    found: Objects = request.getfixturevalue(request.param)
    return found


class Unseekable(io.RawIOBase):
    """A source that can be read once, and fails after `good` bytes where that is given."""

    def __init__(self, data: bytes, good: int | None = None) -> None:
        self._file, self._good = io.BytesIO(data), good

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._good is not None and self._file.tell() >= self._good:
            raise OSError("the source is gone")
        return self._file.readinto(buffer)


def test_what_was_put_is_read_whole_and_in_parts(objects: Objects) -> None:
    data = os.urandom(300_000)
    assert objects.put("a/b-c/d_e.f", io.BytesIO(data)) == 300_000
    assert objects.size("a/b-c/d_e.f") == 300_000
    with objects.open_read("a/b-c/d_e.f") as file:
        assert file.read() == data
    for start, length in ((0, 10), (299_990, None), (299_990, 1_000), (7, 100_000), (300_000, None), (400_000, 5)):
        with objects.open_read("a/b-c/d_e.f", start=start, length=length) as file:
            assert file.read() == data[start : None if length is None else start + length]
    with objects.open_read("a/b-c/d_e.f", start=5, length=0) as file:
        assert file.read() == b""


def test_a_put_replaces_and_takes_what_is_left_of_its_source(objects: Objects) -> None:
    objects.put("a", io.BytesIO(b"first"))
    source = io.BytesIO(b"not this, this")
    source.seek(10)
    assert objects.put("a", source) == 4
    with objects.open_read("a") as file:
        assert file.read() == b"this"
    assert objects.put("a", io.BufferedReader(Unseekable(b"once"))) == 4
    assert objects.put("empty", io.BytesIO()) == objects.size("empty") == 0
    with objects.open_read("empty") as file:
        assert file.read() == b""


def test_what_is_not_there_is_missing_and_deleted_twice(objects: Objects) -> None:
    for ask in (objects.size, objects.open_read):
        with pytest.raises(ObjectMissing, match="a/b"):
            ask("a/b")
    objects.delete("a/b")
    objects.put("a/b", io.BytesIO(b"x"))
    objects.delete("a/b")
    objects.delete("a/b")
    with pytest.raises(ObjectMissing):
        objects.open_read("a/b", start=3, length=0)
    assert list(objects.keys("")) == []


def test_keys_are_those_that_begin_with_a_prefix(objects: Objects) -> None:
    for key in ("a/1", "a/2", "ab", "b/c/d"):
        objects.put(key, io.BytesIO(b"x"))
    assert sorted(objects.keys("")) == ["a/1", "a/2", "ab", "b/c/d"]
    assert sorted(objects.keys("a")) == ["a/1", "a/2", "ab"]
    assert sorted(objects.keys("a/")) == ["a/1", "a/2"]
    assert sorted(objects.keys("b/c")) == ["b/c/d"]
    assert sorted(objects.keys("z/")) == []


@pytest.mark.parametrize(
    "key",
    ["", "/a", "a/", "a//b", "..", "a/../b", "./a", "tmp/x", "tmp", "a b", "a\n", "a\0", "é", ".hidden", "x" * 600],
)
def test_what_is_no_key_never_becomes_a_path(objects: Objects, key: str) -> None:
    for ask in (objects.size, objects.delete, objects.open_read):
        with pytest.raises(ValueError, match="is no key"):
            ask(key)
    with pytest.raises(ValueError, match="is no key"):
        objects.put(key, io.BytesIO(b"x"))


def test_a_source_that_fails_leaves_what_was_there(objects: Objects) -> None:
    objects.put("a", io.BytesIO(b"before"))
    with pytest.raises(OSError, match="the source is gone"):
        objects.put("a", io.BufferedReader(Unseekable(bytes(12 << 20), good=6 << 20), 1 << 20))
    with objects.open_read("a") as file:
        assert file.read() == b"before"
    assert list(objects.keys("")) == ["a"]
    assert objects.forget_unfinished(older_than_s=-60) == 0


def test_many_writers_of_one_key_leave_one_of_their_blobs(objects: Objects) -> None:
    blobs = [bytes([number]) * 200_000 for number in range(8)]

    def write(blob: bytes) -> None:
        # The server that stands in for S3 now and then fails one of two writers of a key that meet.
        with contextlib.suppress(StoreUnavailable):
            objects.put("a/b", io.BytesIO(blob))

    threads = [threading.Thread(target=write, args=(blob,)) for blob in blobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with objects.open_read("a/b") as file:
        assert file.read() in blobs


def test_a_writer_and_a_deleter_of_one_folder_do_not_meet(folder: Objects) -> None:
    def delete() -> None:
        while not done.is_set():
            folder.delete("a/b/c")

    done = threading.Event()
    thread = threading.Thread(target=delete)
    thread.start()
    try:
        for _ in range(50):
            folder.put("a/b/c", io.BytesIO(b"x"))
    finally:
        done.set()
        thread.join()


def test_links_below_a_folder_are_not_followed(tmp_path: Path, folder: Objects) -> None:
    assert isinstance(folder, FolderObjects)
    folder.put("a/b", io.BytesIO(b"inside"))
    secret = tmp_path / "outside"
    secret.mkdir()
    (secret / "b").write_bytes(b"outside")
    (folder.root / "link").symlink_to(secret)
    (folder.root / "a/file").symlink_to(secret / "b")
    os.mkfifo(folder.root / "a/pipe")
    for key in ("link/b", "a/file", "a/pipe", "a", "a/b/c"):
        with pytest.raises(ObjectMissing):
            folder.open_read(key)
    with pytest.raises(OSError, match="is a link"):
        folder.put("link/new", io.BytesIO(b"x"))
    folder.delete("link/b")
    assert sorted(path.name for path in secret.iterdir()) == ["b"]


def test_parts_are_sent_one_by_one_and_joined(s3: S3Server, remote: Objects) -> None:
    data = os.urandom(12 << 20)
    s3.requests.clear()
    assert remote.put("big", io.BytesIO(data)) == len(data)
    assert sum("partNumber" in line for line in s3.requests) == 3
    with remote.open_read("big") as file:
        assert file.read() == data
    assert s3.num_uploads() == 0


@pytest.mark.parametrize("fates", [[Fate.AWAY] * 2, [Fate.DROPPED] * 2, [Fate.SLOW]], ids=["away", "dropped", "slow"])
def test_a_request_that_fails_for_a_moment_is_made_again(s3: S3Server, remote: Objects, fates: list[Fate]) -> None:
    s3.fates += fates[:1]
    remote.put("a", io.BytesIO(b"abc"))
    s3.fates += fates[:1]
    with remote.open_read("a") as file:
        assert file.read() == b"abc"
    if fates != [Fate.SLOW]:
        s3.fates += fates
        with pytest.raises(StoreUnavailable):
            remote.size("a")


def test_a_store_that_goes_away_amid_an_upload_leaves_nothing(s3: S3Server, remote: Objects) -> None:
    class Falling(io.BytesIO):
        num_reads = 0

        def read(self, size: int | None = -1, /) -> bytes:
            Falling.num_reads += size == 5 << 20
            s3.is_down = Falling.num_reads >= 2
            return super().read(size)

    with pytest.raises(StoreUnavailable):
        remote.put("big", Falling(os.urandom(12 << 20)))
    s3.is_down = False
    with pytest.raises(ObjectMissing):
        remote.size("big")
    assert s3.num_uploads() == 1, "not even the abort got through"
    assert remote.forget_unfinished(older_than_s=50 * 365 * 24 * 3600.0) == 0
    assert remote.forget_unfinished(older_than_s=-60) == 1
    assert s3.num_uploads() == 0


def test_an_upload_that_is_refused_midway_is_aborted(s3: S3Server, remote: Objects) -> None:
    class Falling(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if size == 5 << 20 and self.tell() == 5 << 20:
                s3.fates += [Fate.AWAY] * 2
            return super().read(size)

    with pytest.raises(StoreUnavailable):
        remote.put("big", Falling(os.urandom(12 << 20)))
    assert s3.num_uploads() == 0
    with pytest.raises(ObjectMissing):
        remote.size("big")


def test_a_cut_and_a_changed_answer_are_seen(s3: S3Server, remote: Objects) -> None:
    remote.put("a", io.BytesIO(os.urandom(3 << 20)))
    s3.fates.append(Fate.CUT)
    with remote.open_read("a") as file, pytest.raises(StoreUnavailable):
        file.read()
    s3.fates.append(Fate.CHANGED)
    with remote.open_read("a") as file, pytest.raises(ObjectCorrupt, match="SHA-256"):
        file.read()


def test_a_store_that_is_away_says_so_without_its_address(s3: S3Server, remote: Objects) -> None:
    s3.is_down = True
    for ask in (remote.size, remote.open_read, remote.delete):
        with pytest.raises(StoreUnavailable) as raised:
            ask("a")
        assert "127.0.0.1" not in str(raised.value)
    with pytest.raises(StoreUnavailable):
        list(remote.keys(""))


@pytest.mark.usefixtures("remote")
def test_a_bucket_that_is_not_there_is_no_missing_object() -> None:
    with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
        Objects.open(f"s3://no-{BUCKET}").open_read("a")


@pytest.mark.parametrize(
    "url", ["s3://", "s3:bucket", "s3://key:secret@bucket", "s3://bucket?x=1", "gs://b", "https://h/x"]
)
@pytest.mark.usefixtures("remote")
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(UnsupportedStore):
        Objects.open(url)


def test_keys_of_the_store_come_from_variables_or_files_and_never_show(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("very secret\n")
    access = store_access_from_env(
        {"MEDLEY_STORE_ACCESS_KEY": "who", "MEDLEY_STORE_SECRET_KEY_FILE": str(tmp_path / "secret")}
    )
    assert (access.access_key, access.secret_key) == ("who", "very secret")
    assert "very secret" not in repr(access)
    for environ in (
        {"MEDLEY_STORE_ACCESS_KEY": "very secret"},
        {"MEDLEY_STORE_ENDPOINT": "ftp://host"},
        {"MEDLEY_STORE_ACCESS_KEY_FILE": str(tmp_path / "absent"), "MEDLEY_STORE_SECRET_KEY": "very secret"},
        {"MEDLEY_STORE_SECRET_KEY": "very secret", "MEDLEY_STORE_SECRET_KEY_FILE": str(tmp_path / "secret")},
    ):
        with pytest.raises(ConfigError) as raised:
            store_access_from_env(environ)
        assert "very secret" not in str(raised.value)
