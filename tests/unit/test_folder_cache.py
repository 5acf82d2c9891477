"""The worker's folder of fetched adapters: within its limit, the longest unused goes, what is in use never does."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from medley_worker.shell.folder_cache import FolderCache, NoRoom

A, B, C = "a" * 64, "b" * 64, "c" * 64


def writer(num_bytes: int) -> Callable[[Path], object]:
    return lambda folder: (folder / "weights").write_bytes(bytes(num_bytes))


def fill(cache: FolderCache, *digests: str, num_bytes: int = 40) -> None:
    """Adds these one after the other, none of them in use at the end."""
    for at, digest in enumerate(digests):
        cache.add(digest, num_bytes, writer(num_bytes))
        folder = cache.use(digest)
        assert folder is not None
        os.utime(folder, (at, at))
    cache.release(())


@pytest.fixture
def cache(tmp_path: Path) -> FolderCache:
    return FolderCache(tmp_path / "cache", 100)


def test_the_longest_unused_goes_when_room_is_needed(cache: FolderCache) -> None:
    fill(cache, A, B)
    assert cache.use(A) is not None  # and so B is the longest unused
    cache.release(())
    fill(cache, C)
    assert cache.use(B) is None
    assert cache.use(A) is not None
    assert cache.use(C) is not None
    assert list((cache.root / "tmp").iterdir()) == []


def test_what_is_in_use_stays_and_what_finds_no_room_waits(cache: FolderCache) -> None:
    fill(cache, A, B)
    in_use = [cache.use(digest) for digest in (A, B)]
    with pytest.raises(NoRoom):
        cache.add(C, 40, writer(40))
    assert all(folder is not None and (folder / "weights").exists() for folder in in_use)
    cache.release({B})
    cache.add(C, 40, writer(40))
    assert cache.use(A) is None


def test_what_another_process_uses_stays_until_it_dies(cache: FolderCache) -> None:
    fill(cache, A, B)
    script = (
        "import sys; from pathlib import Path\n"
        "from medley_worker.shell.folder_cache import FolderCache\n"
        "cache = FolderCache(Path(sys.argv[1]), 100)\n"
        "print([cache.use(digest) is not None for digest in sys.argv[2:]], flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(cache.root), A, B]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "[True, True]"
        with pytest.raises(NoRoom):
            cache.add(C, 40, writer(40))
        other.kill()
    cache.add(C, 40, writer(40))
    assert cache.use(A) is None


def test_what_can_never_fit_says_so(cache: FolderCache) -> None:
    with pytest.raises(OSError, match="larger than the worker's cache"):
        cache.add(A, 101, writer(101))


def test_a_fetch_that_fails_leaves_nothing(cache: FolderCache) -> None:
    def fail(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        cache.add(A, 40, fail)
    assert cache.use(A) is None
    assert list((cache.root / "tmp").iterdir()) == []
    fill(cache, A, B)


def test_fetchers_of_the_same_and_of_others_stay_within_the_limit(cache: FolderCache) -> None:
    digests = [f"{number:x}" * 64 for number in range(6)]
    errors: list[Exception] = []

    def fetch(turn: int) -> None:
        for step in range(30):
            digest = digests[(turn * step + step) % len(digests)]
            try:
                if cache.use(digest) is None:
                    cache.add(digest, 30, writer(30))
            except NoRoom:
                pass
            except Exception as error:
                errors.append(error)
            cache.release(())
            with cache._lock:  # a look at many folders while others come and go would count some that never met
                num_held = len(list(cache.root.glob("??/*")))
            if num_held > 3:
                errors.append(AssertionError("more than there is room for"))

    threads = [threading.Thread(target=fetch, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("open", "link"):
        with pytest.raises(PermissionError, match="own folder"):
            FolderCache(tmp_path / name, 100)
