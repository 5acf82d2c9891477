"""A worker on another host: it is given four addresses (and the store's keys), and nothing of this machine's state."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3Server, running_s3
from shells import ShellProcess, Site

import medley
from medley.db.workers import WorkerState

ASSETS = Path(medley.__file__).parent / "demo" / "assets"
SKILL = "caesar-3"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with running_s3() as server:
        yield server


@pytest.fixture
def site(database: Any, embedded: Any, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    for key, value in s3.environ().items():
        monkeypatch.setenv(key, value)
    site = Site(database, embedded.redis_url, s3.new_url(), ASSETS / "model", tmp_path)
    yield site
    site.close()


def test_a_worker_needs_its_addresses_the_store_and_the_model_and_nothing_else(
    site: Site, database: Any, embedded: Any, s3: S3Server, tmp_path: Path
) -> None:
    env = {
        "MEDLEY_DATABASE_URL": database.url("medley_work"),
        "MEDLEY_REDIS_URL": embedded.redis_url,
        "MEDLEY_STORE_URL": site._store_url,
        "MEDLEY_MODEL": str(ASSETS / "model"),
        **s3.environ(),  # of a store that is not AWS's own
    }
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [str(Path(sys.executable).parent / "medley"), "worker"]
    log = tmp_path / "worker.log"
    with (
        log.open("wb") as out,
        subprocess.Popen(command, env=env, cwd=elsewhere, stdin=subprocess.DEVNULL, stdout=out, stderr=out) as process,
    ):
        try:
            _work(site, process, log)
        finally:
            process.terminate()
            assert process.wait(30) == 0, log.read_text()
    assert list(elsewhere.iterdir()) == [], "it leaves nothing where it was started"
    assert [row.state for row in site.workers()] == ["gone"]


def _work(site: Site, process: subprocess.Popen[bytes], log: Path) -> None:
    site.wait_until("a registered worker", lambda: bool(site.workers()))
    [row] = site.workers()
    assert row.version == metadata.version("medley")
    shell = ShellProcess(process, row.id, log)
    folder = ASSETS / "adapters" / SKILL
    digest = site.store.put((folder / "adapter_config.json").read_bytes(), folder / "adapter_model.safetensors")
    revision = site.add_revision(SKILL, seed=0, digest=digest)
    site.desire(shell, WorkerState.ACTIVE)
    site.wait_until("an active worker", lambda: site.workers()[0].state == "active", timeout_s=120)
    batch = site.submit({"prompt": "planet=", "revision": revision, "max_tokens": 16, "ignore_eos": False})
    site.ring(shell, site.claim(shell))
    [result] = site.wait_results(batch, 1, timeout_s=120)
    assert (result.state, result.text) == ("succeeded", "sodqhw"), log.read_text()
