"""What the tests of the service share: a database as its processes see it, the API over HTTP, and where shells run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import Api, running_api
from ledger import Ledger
from shells import Site, make_model
from staging import Stage

from medley import celery_app, rings
from medley.local.embedded import EmbeddedServers


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings and messages, which else are dropped after a second, wait for a Redis that is held up."""
    monkeypatch.setattr(rings, "SOCKET_TIMEOUT_S", 30.0)
    monkeypatch.setattr(celery_app, "PUBLISH_TIMEOUT_S", 30.0)


@pytest.fixture
def ledger(module_database: Any) -> Iterator[Ledger]:
    """On the database that the tests of one module share."""
    made = Ledger(module_database)
    yield made
    made.close()


@pytest.fixture
def stage(module_database: Any, redis_url: str) -> Iterator[Stage]:
    made = Stage(module_database, redis_url)
    yield made
    made.close()


@pytest.fixture(scope="module")
def api(
    request: pytest.FixtureRequest,
    module_database: Any,
    embedded: EmbeddedServers,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Api]:
    """The API within the test module's own `LIMITS`; its webhooks may lead here where it says `WEBHOOK_LOOPBACK`."""
    store_url = tmp_path_factory.mktemp("store").as_uri()
    loopback = getattr(request.module, "WEBHOOK_LOOPBACK", False)
    with running_api(
        module_database, embedded.redis_url, store_url, limits=request.module.LIMITS, webhook_loopback=loopback
    ) as api:
        yield api


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model for shells."""
    return make_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def site(database: Any, redis_url: str, store_url: str, model: Path, tmp_path: Path) -> Iterator[Site]:
    """For shells of one test: on a database of its own, as they may end in any way."""
    made = Site(database, redis_url, store_url, model, tmp_path)
    yield made
    made.close()
