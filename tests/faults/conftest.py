"""Starts whole stacks of real processes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleets import Fleet, make_fleet
from stacks import ASSETS, LEASE_S, TICK_S, Service

from medley.client import Client
from medley.db.connections import make_engine
from medley.demo.skills import SKILLS
from medley.local.stack import LocalStack


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stack that was stopped in good order: a tenant with six of the demo's adapters."""
    folder = tmp_path_factory.mktemp("prepared") / "data"
    with (
        LocalStack(folder, model=ASSETS / "model", workers=0) as stack,
        Client(stack.url, stack.add_tenant("acme")) as client,
    ):
        for skill in SKILLS[:6]:
            client.adapters.add(skill.name, ASSETS / "adapters" / skill.name)
    return folder


@pytest.fixture
def start_service(tmp_path: Path, prepared: Path) -> Iterator[Callable[..., Service]]:
    """Starts a stack with the demo's model, a tenant and six of its adapters, on a copy of what was prepared."""
    started: list[Service] = []

    def start(*, workers: int = 1, **environ: str) -> Service:
        settings = {"MEDLEY_LEASE_S": str(LEASE_S), "MEDLEY_TICK_S": str(TICK_S), "MEDLEY_MAX_NUM_SEQS": "16"}
        # With owners: the database's files may be another account's.
        subprocess.run(["cp", "-a", str(prepared), str(tmp_path / "data")], check=True)
        stack = LocalStack(tmp_path / "data", model=ASSETS / "model", workers=workers, environ=settings | environ)
        stack.start()
        client = Client(stack.url, stack.add_tenant("acme"))
        service = Service(stack, client, make_engine(stack.database_url("medley_work"), name="audit"))
        started.append(service)
        return service

    yield start
    for service in started:
        service.client.close()
        service.engine.dispose()
        service.stack.stop()


@pytest.fixture
def start_fleet(start_service: Callable[..., Service]) -> Iterator[Callable[..., Fleet]]:
    """Starts a stack without workers; the scenario adds them."""
    fleets: list[Fleet] = []

    def start(**environ: str) -> Fleet:
        fleets.append(make_fleet(start_service(workers=0, **environ)))
        return fleets[-1]

    yield start
    for fleet in fleets:
        fleet.close()
