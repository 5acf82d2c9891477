"""The schema: up, down and up again, equal to the models, forced row-level security on every tenant's table."""

from __future__ import annotations

from typing import Any

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, text

from medley.db.migrate import downgrade, head, is_current, upgrade
from medley.db.models import metadata


def as_owner(database: Any, act: Any) -> Any:
    engine = create_engine(database.url("medley_owner"))
    try:
        with engine.connect() as connection:
            return act(connection)
    finally:
        engine.dispose()


def test_a_database_goes_up_and_down_and_up_and_equals_the_models(empty_database: Any) -> None:
    url = empty_database.url("medley_owner")
    upgrade(url)
    upgrade(url)
    assert as_owner(empty_database, is_current)
    first = as_owner(empty_database, _shape)
    downgrade(url, "base")
    assert as_owner(empty_database, _tables) <= {"alembic_version"}
    assert not as_owner(empty_database, is_current)
    upgrade(url)
    assert as_owner(empty_database, _shape) == first
    assert as_owner(empty_database, _differences) == []


def test_a_filled_database_can_be_taken_down(empty_database: Any) -> None:
    from medley.db.tenants import add_tenant

    url = empty_database.url("medley_owner")
    upgrade(url)

    def fill(connection: Connection) -> None:
        add_tenant(connection, "acme")
        connection.commit()

    as_owner(empty_database, fill)
    downgrade(url, "base")
    upgrade(url)
    assert as_owner(empty_database, is_current)


def test_there_is_one_newest_version() -> None:
    assert head() is not None


def test_every_table_with_a_tenant_forces_row_level_security(database: Any) -> None:
    secured = as_owner(
        database,
        lambda connection: set(
            connection.execute(
                text("SELECT relname FROM pg_class WHERE relrowsecurity AND relforcerowsecurity")
            ).scalars()
        ),
    )
    with_tenant = {table.name for table in metadata.sorted_tables if "tenant_id" in table.columns} | {"tenants"}
    assert with_tenant <= secured


def _tables(connection: Connection) -> set[str]:
    statement = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
    return set(connection.execute(text(statement)).scalars())


def _shape(connection: Connection) -> list[tuple[Any, ...]]:
    """Columns, indexes, constraints, policies and grants, as text."""
    statements = (
        "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns"
        " WHERE table_schema = 'public'",
        "SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'",
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE connamespace = 'public'::regnamespace",
        "SELECT tablename, policyname, roles::text, cmd, qual, with_check FROM pg_policies",
        "SELECT table_name, grantee, privilege_type FROM information_schema.role_table_grants"
        " WHERE table_schema = 'public'",
    )
    return sorted(tuple(map(str, row)) for s in statements for row in connection.execute(text(s)))


def _differences(connection: Connection) -> list[Any]:
    context = MigrationContext.configure(
        connection, opts={"compare_type": True, "compare_server_default": True, "target_metadata": metadata}
    )
    return list(compare_metadata(context, metadata))
