"""Real servers for every test that wants them: a PostgreSQL and a Redis a test process, a database a test.

Nothing here is imported until a test asks for it, so that tests of the engine pay nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from medley.local.embedded import EmbeddedServers

_templates: dict[date, str] = {}  # migrated databases to clone, by the day whose partitions they have
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Database:
    """One migrated database, gone after the test."""

    name: str
    servers: EmbeddedServers

    def url(self, role: str) -> str:
        """A SQLAlchemy URL for medley_owner, medley_api or medley_work."""
        return self.servers.database_url(role, self.name)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServers]:
    """Started PostgreSQL and Redis; `database_url("medley_owner")` is the migrated database that tests clone.

    Do not write to that database, nor leave a connection to it open: use `database`.
    """
    from medley.db.migrate import upgrade
    from medley.local.datadir import DataDir
    from medley.local.embedded import EmbeddedServers

    data = DataDir.acquire(tmp_path_factory.mktemp("embedded"))
    # Tests kill processes, never the machine: without fsync nothing that they can see changes.
    with EmbeddedServers(data, durable=False, owner_may_create_databases=True) as servers:
        _templates[datetime.now(UTC).date()] = "medley"
        upgrade(servers.database_url("medley_owner"))
        yield servers


@pytest.fixture
def empty_database(embedded: EmbeddedServers) -> Iterator[Database]:
    """A database without a schema, owned by medley_owner (the roles exist in the cluster)."""
    yield from _cloned(embedded, "template0")


@pytest.fixture
def database(embedded: EmbeddedServers) -> Iterator[Database]:
    """A migrated database of this test's own."""
    yield from _cloned(embedded, _template(embedded))


@pytest.fixture(scope="module")
def module_database(embedded: EmbeddedServers) -> Iterator[Database]:
    """A migrated database that the tests of one module share."""
    yield from _cloned(embedded, _template(embedded))


@pytest.fixture
def redis_url(embedded: EmbeddedServers) -> str:
    """The URL of a Redis that was just flushed."""
    import redis

    with redis.Redis.from_url(embedded.redis_url) as client:
        client.flushall()
    return embedded.redis_url


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """The URL of an empty adapter store."""
    (tmp_path / "store").mkdir()
    return (tmp_path / "store").as_uri()


def _template(servers: EmbeddedServers) -> str:
    """The name of a migrated database of today, made anew when midnight has passed."""
    today = datetime.now(UTC).date()
    if today not in _templates:
        from medley.db.migrate import upgrade

        name = f"medley_{today:%Y%m%d}"
        _create(servers, name, "template0")
        upgrade(servers.database_url("medley_owner", name))
        _templates[today] = name
    return _templates[today]


def _cloned(servers: EmbeddedServers, template: str) -> Iterator[Database]:
    name = f"test_{next(_numbers)}"
    _create(servers, name, template)
    try:
        yield Database(name, servers)
    finally:
        _execute(servers, f"DROP DATABASE {name} WITH (FORCE)")


def _create(servers: EmbeddedServers, name: str, template: str) -> None:
    _execute(servers, f"CREATE DATABASE {name} TEMPLATE {template}")


def _execute(servers: EmbeddedServers, statement: str) -> None:
    import psycopg

    # Connected to a database that is nobody's template.
    admin = servers.database_url("medley_owner").replace("+psycopg", "").replace("/medley?", "/postgres?")
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(statement.encode())
