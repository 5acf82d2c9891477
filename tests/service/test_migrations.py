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


def test_what_was_there_before_it_was_counted_by_adapter_is_counted(empty_database: Any) -> None:
    """Batches, usage and sweeps that the first version has written add up in the newest."""
    url = empty_database.url("medley_owner")
    upgrade(url, "0001")

    def fill(connection: Connection) -> None:
        tables = connection.execute(text("SELECT relname FROM pg_class WHERE relforcerowsecurity")).scalars().all()
        for force in ("NO FORCE", "FORCE"):
            if force == "FORCE":
                connection.execute(text(OLD_ROWS))
            for table in tables:
                connection.execute(text(f"ALTER TABLE {table} {force} ROW LEVEL SECURITY"))
        connection.commit()

    as_owner(empty_database, fill)
    upgrade(url)
    engine = create_engine(empty_database.url("medley_work"))
    with engine.connect() as connection:
        lanes = connection.execute(
            text(
                "SELECT adapter, total, succeeded, failed, completion_tokens FROM batch_lanes ORDER BY batch_id, total"
            )
        ).all()
        assert [tuple(row) for row in lanes] == [(None, 2, 1, 1, 5), ("a", 4, 0, 0, 0), (None, 6, 0, 0, 0)]
        failures = connection.execute(text("SELECT code, num_jobs FROM batch_failures")).all()
        assert [tuple(row) for row in failures] == [("engine", 1)]
        used = connection.execute(text("SELECT day::text, num_jobs, completion_tokens FROM usage")).all()
        assert [tuple(row) for row in used] == [("2026-01-02", 2, 5)]
        parts = connection.execute(text("SELECT part_idx, num_prompts, num_columns, num_seeds FROM sweep_parts")).all()
        assert [tuple(row) for row in parts] == [(0, 3, 2, 2)]
    engine.dispose()


# A batch of two that has ended, and a sweep (a prompt of its three is the adapter's alone) with no job yet.
OLD_ROWS = """
INSERT INTO tenants (id, name) VALUES ('00000000-0000-7000-8000-000000000001', 'acme');
INSERT INTO batches (id, tenant_id, pool, total, succeeded, failed, completion_tokens, last_seq, finished_at) VALUES
    ('00000000-0000-7000-8000-0000000000b1', '00000000-0000-7000-8000-000000000001', 'p', 2, 1, 1, 5, 2, now()),
    ('00000000-0000-7000-8000-0000000000b2', '00000000-0000-7000-8000-000000000001', 'p', 10, 0, 0, 0, 0, NULL);
INSERT INTO jobs (id, tenant_id, batch_id, pool, state, priority, est_tokens, finished_at) SELECT
    ('00000000-0000-7000-8000-0000000000a' || n)::uuid, b.tenant_id, b.id, 'p',
    CASE n WHEN 1 THEN 'succeeded' ELSE 'failed' END, 1, 1, '2026-01-02 23:59+00'
    FROM batches b, generate_series(1, 2) n WHERE b.total = 2;
INSERT INTO job_inputs (job_id, tenant_id, batch_id, prompt, seed) SELECT id, tenant_id, batch_id, 'x', 1 FROM jobs;
INSERT INTO job_results (job_id, tenant_id, batch_id, seq, state, error_code, completion_tokens, worker_id)
    SELECT id, tenant_id, batch_id, row_number() OVER (ORDER BY id), state,
        CASE state WHEN 'failed' THEN 'engine' END, CASE state WHEN 'succeeded' THEN 5 ELSE 0 END, id FROM jobs;
INSERT INTO adapters (id, tenant_id, name) SELECT id, id, 'a' FROM tenants;
INSERT INTO adapter_revisions (id, tenant_id, adapter_id, digest, max_rank, num_tiles, size_bytes)
    SELECT '00000000-0000-7000-8000-0000000000c1', id, id, repeat('a', 64), 1, 1, 1 FROM tenants;
INSERT INTO sweeps (id, tenant_id, name, definition_sha256, sampling, seeds, num_prompts, num_columns, expand_due_at)
    SELECT id, tenant_id, 's', '', jsonb_build_object('max_tokens', 4), ARRAY[1, 2], 3, 2, now() FROM batches
    WHERE total = 10;
INSERT INTO sweep_prompts (sweep_id, prompt_idx, tenant_id, prompt, only_adapter)
    SELECT id, n, tenant_id, 'p', CASE n WHEN 2 THEN 'other' END FROM sweeps, generate_series(0, 2) n;
INSERT INTO sweep_columns (sweep_id, column_idx, tenant_id, adapter, revision_id) SELECT id, n, tenant_id,
    CASE n WHEN 0 THEN 'a' END, CASE n WHEN 0 THEN '00000000-0000-7000-8000-0000000000c1'::uuid END
    FROM sweeps, generate_series(0, 1) n;
"""


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
