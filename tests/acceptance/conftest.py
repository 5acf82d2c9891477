"""The service as its tenants meet it: a real API over real servers, a client and a command line of a new tenant."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medley.client import Client
from medley.config import Limits
from medley.local.embedded import EmbeddedServers

# The API in a thread, and workers that complete jobs by `medley.db`, belong to the tests of the service.
sys.path.append(str(Path(__file__).parents[1] / "service"))

from api_server import Api, running_api


@pytest.fixture(scope="module")
def api(module_database: Any, embedded: EmbeddedServers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    store_url = tmp_path_factory.mktemp("store").as_uri()
    limits = Limits(max_body_bytes=2 << 20, max_prompt_bytes=1_000, max_jobs_per_request=10_000)
    with running_api(module_database, embedded.redis_url, store_url, limits=limits, webhook_loopback=True) as api:
        yield api


@pytest.fixture
def tenant(api: Api) -> str:
    """The name of a tenant of this test's own."""
    return api.take_new_tenant()


@pytest.fixture
def client(api: Api, tenant: str) -> Iterator[Client]:
    with Client(api.url, api.key(tenant)) as client:
        yield client
