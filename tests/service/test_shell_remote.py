"""A worker whose store is S3-compatible: adapters come to its cache when jobs want them, whatever the store does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_line import Fate
from s3_server import BUCKET, S3Server, running_s3
from shells import ShellProcess, Site, make_model

from medley.objects import Objects

ADAPTER_BYTES = 2_800  # of one, with its configuration; the cache holds two


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as server:
        yield server


@pytest.fixture(scope="module")
def site(module_database: Any, embedded: Any, s3: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in s3.environ().items():
            patch.setenv(key, value)
        site = Site(module_database, embedded.redis_url, s3.new_url(), make_model(folder / "model"), folder)
        yield site
        site.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def shell(site: Site, cache: Path) -> ShellProcess:
    return site.start_shell(MEDLEY_STORE_CACHE_DIR=str(cache), MEDLEY_STORE_CACHE_BYTES=str(2 * ADAPTER_BYTES + 100))


def jobs_of(*revisions: Any) -> list[dict[str, Any]]:
    return [{"prompt": "abc", "revision": revision} for revision in revisions]


def test_adapters_are_fetched_when_wanted_kept_within_the_limit_and_fetched_again(
    site: Site, shell: ShellProcess, s3: S3Server, cache: Path
) -> None:
    revisions = [site.add_revision(f"a{seed}", seed=seed) for seed in range(4)]
    sizes = {len(_weights(site, revision)) for revision in revisions}
    assert max(sizes) < ADAPTER_BYTES, sizes
    s3.requests.clear()
    rows = site.run(shell, *jobs_of(*revisions, None, *revisions))
    assert [row.state for row in rows] == ["succeeded"] * 9
    texts = [tuple(row.token_ids) for row in rows]
    assert texts[:4] == texts[5:]
    assert len(set(texts[:5])) == 5, "each adapter changes the answer"
    assert len(list(cache.glob("??/*"))) <= 2
    assert [tuple(row.token_ids) for row in site.run(shell, *jobs_of(revisions[0]))] == texts[:1]


def test_a_store_that_is_away_delays_jobs_and_fails_none(site: Site, shell: ShellProcess, s3: S3Server) -> None:
    revision = site.add_revision("away", seed=11)
    s3.is_down = True
    batch = site.submit(*jobs_of(revision), {"prompt": "abc"})
    site.ring(shell, site.claim(shell))
    site.wait_results(batch, 1)
    site.wait_until("a fetch that failed", lambda: "adapter.unfetched" in shell.log())
    s3.fates += [Fate.AWAY, Fate.CUT, Fate.CUT]
    s3.is_down = False
    assert [row.state for row in site.wait_results(batch, 2)] == ["succeeded"] * 2


def test_files_that_are_missing_or_damaged_fail_their_jobs_alone(site: Site, shell: ShellProcess, s3: S3Server) -> None:
    good, damaged = site.add_revision("good", seed=21), site.add_revision("damaged", seed=22)
    missing = site.add_revision("missing", seed=0, digest="0" * 64)
    place = {"Bucket": BUCKET, "Key": f"{_prefix(site)}/{_weights_key(site, damaged)}"}
    body = s3.client.get_object(**place)["Body"].read()
    s3.client.put_object(**place, Body=body[:-1] + bytes([body[-1] ^ 1]))
    rows = site.run(shell, *jobs_of(damaged, good, missing))
    assert [row.error_code for row in rows] == ["adapter_unavailable", None, "adapter_unavailable"]


def _prefix(site: Site) -> str:
    prefix: str = site.store.objects._prefix.rstrip("/")  # type: ignore[attr-defined]
    return prefix


def _weights_key(site: Site, revision: Any) -> str:
    digest = site.digest_of(revision)
    return f"sha256/{digest[:2]}/{digest}/adapter_model.safetensors"


def _weights(site: Site, revision: Any) -> bytes:
    objects: Objects = site.store.objects
    with objects.open_read(_weights_key(site, revision)) as file:
        return file.read()
