"""Retention: inputs and results in partitions of a day, kept as long as their tenant says; and the end of a tenant.

`job_inputs` and `job_results` are partitioned by the time that is in a job's id, so that a day whose jobs are gone is
dropped whole. `jobs` stays one table: its queued rows may be of any age, and a claim would look into each day's index
for each lane; its rows are small and go in chunks. `checkpoints` hold unfinished jobs alone and need no partitions.

Partitions lie in a schema of their own that neither `medley_api` nor `medley_work` may enter: their rows are reached
through the parent, under its policies. `medley_work` makes and drops partitions, and erases a tenant's rows, by
functions that run as the owner and each do that one thing.

Revision ID: 0005
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from alembic import op
from sqlalchemy import text

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

PARTITIONED = ("job_inputs", "job_results")
AHEAD_DAYS = 3

TABLES = """
ALTER TABLE tenants
    ADD COLUMN retention_days integer NOT NULL DEFAULT 30 CHECK (retention_days BETWEEN 1 AND 3650),
    ADD COLUMN delete_requested_at timestamptz,     -- from now on it may do nothing,
    ADD COLUMN delete_due_at timestamptz,           -- and from then on its rows are erased
    ADD CHECK ((delete_requested_at IS NULL) = (delete_due_at IS NULL));

-- What is due is found tenant by tenant.
CREATE INDEX batches_tenant_id_finished_at ON batches (tenant_id, finished_at) WHERE finished_at IS NOT NULL;

-- A sweep may name a revision that another tenant shares and that goes with its owner: the jobs then say so.
ALTER TABLE sweep_columns DROP CONSTRAINT sweep_columns_revision_id_fkey;

-- Days of which jobs have gone by retention: their inputs and results wait there for the partition to be dropped,
-- and are deleted where it is not within a day.
CREATE TABLE expired_jobs (
    day date PRIMARY KEY,
    num_jobs bigint NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- The end of a tenant: how far it has come, and in the end its certificate. It outlives the tenant.
CREATE TABLE erasures (
    id uuid PRIMARY KEY,                    -- the tenant's
    name text NOT NULL,
    requested_at timestamptz NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    finished_at timestamptz,
    num_rows jsonb NOT NULL DEFAULT '{}',   -- erased, by table
    digests text[] NOT NULL DEFAULT '{}',   -- of revisions whose rows are gone and whose files are not yet
    num_revisions integer NOT NULL DEFAULT 0,   -- whose files are gone,
    num_shared integer NOT NULL DEFAULT 0       -- or stay, as another tenant has the same
);
"""

# In the order in which they build on each other.
FUNCTIONS = """
-- The least id of that moment: ids begin with 48 bits of milliseconds.
CREATE FUNCTION medley_first_id(moment timestamptz) RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT (lpad(to_hex((extract(epoch FROM moment) * 1000)::bigint), 12, '0') || repeat('0', 20))::uuid
$$;

-- Since when the transaction's tenant keeps what has ended, and the least id of that time. In PL/pgSQL, which keeps
-- their plans: policies ask them in each statement.
CREATE FUNCTION medley_kept_since() RETURNS timestamptz LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
BEGIN
    RETURN (SELECT statement_timestamp() - make_interval(days => retention_days) FROM tenants
        WHERE id = medley_tenant());
END
$$;
CREATE FUNCTION medley_first_kept() RETURNS uuid LANGUAGE plpgsql STABLE PARALLEL SAFE AS $$
BEGIN
    RETURN medley_first_id(medley_kept_since());
END
$$;

-- Whether the transaction's tenant still has this batch: policies ask it of old jobs alone.
CREATE FUNCTION medley_keeps(batch uuid) RETURNS boolean LANGUAGE plpgsql STABLE PARALLEL SAFE COST 10 AS $$
BEGIN
    RETURN EXISTS (SELECT FROM batches WHERE id = batch);
END
$$;

-- Makes the partition of one day (UTC). Rows of that day that had come to the default partition are moved.
CREATE FUNCTION medley_make_partition(parent text, day date) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    spare regclass := to_regclass(format('partitions.%I', parent || '_default'));
    fresh text := format('partitions.%I', parent || to_char(day, '_YYYYMMDD'));
    first uuid := medley_first_id(day::timestamp AT TIME ZONE 'UTC');
    past uuid := medley_first_id((day + 1)::timestamp AT TIME ZONE 'UTC');
    key text := (SELECT attname FROM pg_partitioned_table p
        JOIN pg_attribute a ON a.attrelid = p.partrelid AND a.attnum = p.partattrs[0]
        WHERE p.partrelid = to_regclass(format('public.%I', parent)));
    names text := (SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute
        WHERE attrelid = spare AND attnum > 0 AND NOT attisdropped AND attgenerated = '');
BEGIN
    IF key IS NULL OR spare IS NULL THEN
        RAISE EXCEPTION '% is no table with partitions', parent;
    ELSIF to_regclass(fresh) IS NOT NULL THEN
        RETURN false;
    END IF;
    EXECUTE format('LOCK TABLE ONLY public.%I IN SHARE UPDATE EXCLUSIVE MODE', parent);
    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', spare);
    EXECUTE format('CREATE TABLE %s (LIKE public.%I INCLUDING ALL)', fresh, parent);
    EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', fresh);
    EXECUTE format('CREATE POLICY owner ON %s TO CURRENT_USER USING (true) WITH CHECK (true)', fresh);
    EXECUTE format('WITH moved AS (DELETE FROM %s WHERE %I >= %L AND %I < %L RETURNING %s)'
        ' INSERT INTO %s (%s) SELECT * FROM moved', spare, key, first, key, past, names, fresh, names);
    EXECUTE format('ALTER TABLE public.%I ATTACH PARTITION %s FOR VALUES FROM (%L) TO (%L)',
        parent, fresh, first, past);
    RETURN true;
END
$$;

-- Drops a partition whose time is over and of whose jobs none is left. What waits for the lock on the parent, and
-- comes too late with a job of that time, finds the default partition.
CREATE FUNCTION medley_drop_partition(name text) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    parent regclass;
    bounds text[];
    first uuid;
    past uuid;
BEGIN
    SELECT i.inhparent, regexp_match(pg_get_expr(c.relpartbound, c.oid), 'FROM \\((.+)\\) TO \\(''(.+)''\\)')
    INTO parent, bounds FROM pg_class c JOIN pg_inherits i ON i.inhrelid = c.oid
    WHERE c.oid = to_regclass(format('partitions.%I', name)) AND c.relpartbound IS NOT NULL;
    IF bounds IS NULL THEN
        RETURN false;
    END IF;
    first := CASE bounds[1] WHEN 'MINVALUE' THEN repeat('0', 32) ELSE btrim(bounds[1], '''') END;
    past := bounds[2];
    IF past > medley_first_id(statement_timestamp()) THEN
        RETURN false;
    END IF;
    EXECUTE format('LOCK TABLE %s IN ACCESS EXCLUSIVE MODE', parent);
    IF EXISTS (SELECT FROM jobs WHERE id >= first AND id < past) THEN
        RETURN false;
    END IF;
    EXECUTE format('DROP TABLE partitions.%I', name);
    RETURN true;
END
$$;

-- Erases the rows of a tenant whose time has come from one table: where one of its columns named holds the tenant.
CREATE FUNCTION medley_erase(tenant uuid, tab text, columns text[]) RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    num_rows bigint;
BEGIN
    IF NOT EXISTS (SELECT FROM tenants WHERE id = tenant AND delete_due_at <= statement_timestamp()) THEN
        RAISE EXCEPTION 'tenant % is not to be erased now', tenant;
    END IF;
    PERFORM set_config('medley.erasing', tenant::text, true);   -- what is append-only else lets rows go
    EXECUTE format('DELETE FROM public.%I WHERE %s', tab,
        (SELECT string_agg(format('%I = $1', c), ' OR ') FROM unnest(columns) AS c)) USING tenant;
    GET DIAGNOSTICS num_rows = ROW_COUNT;
    PERFORM set_config('medley.erasing', '', true);
    RETURN num_rows;
END
$$;
"""
OWNER_FUNCTIONS = (
    "medley_make_partition(text, date)",
    "medley_drop_partition(text)",
    "medley_erase(uuid, text, text[])",
)
FUNCTION_NAMES = (
    *OWNER_FUNCTIONS,
    "medley_keeps(uuid)",
    "medley_first_kept()",
    "medley_kept_since()",
    "medley_first_id(timestamptz)",
)

MINE = "tenant_id = (SELECT medley_tenant())"
# A batch is kept for the tenant's days after its end, and its jobs with it. A job made within these days cannot have
# ended before them: so only of older ones is the batch looked up.
KEPT_BATCH = f"{MINE} AND (finished_at IS NULL OR finished_at > (SELECT medley_kept_since()))"
KEPT_JOB = f"{MINE} AND (job_id >= (SELECT medley_first_kept()) OR medley_keeps(batch_id))"


def upgrade() -> None:
    op.execute(TABLES)
    op.execute("CREATE SCHEMA partitions")
    op.execute(FUNCTIONS)
    # Dumps and erasures run as the owner, who is under the policies of every tenant's table too.
    for table in _tables_without_owner():
        op.execute(f"CREATE POLICY owner ON {table} TO medley_owner USING (true) WITH CHECK (true)")
    for table in PARTITIONED:
        _partition(table)
    op.execute(f"ALTER POLICY tenant ON batches USING ({KEPT_BATCH})")
    for function in OWNER_FUNCTIONS:
        op.execute(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {function} TO medley_work")
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON expired_jobs, erasures TO medley_work")
    # A tenant may ask for its own end, which revokes its keys.
    op.execute("GRANT UPDATE (delete_requested_at, delete_due_at) ON tenants TO medley_api")
    op.execute("GRANT UPDATE (revoked_at) ON api_keys TO medley_api")


def downgrade() -> None:
    op.execute("REVOKE UPDATE (delete_requested_at, delete_due_at) ON tenants FROM medley_api")
    op.execute("REVOKE UPDATE (revoked_at) ON api_keys FROM medley_api")
    op.execute(f"ALTER POLICY tenant ON batches USING ({MINE})")
    for table in PARTITIONED:
        _join(table)
    for table in _rows("SELECT tablename FROM pg_policies WHERE schemaname = 'public' AND policyname = 'owner'"):
        op.execute(f"DROP POLICY owner ON {table.tablename}")
    for function in FUNCTION_NAMES:
        op.execute(f"DROP FUNCTION {function}")
    op.execute("DROP SCHEMA partitions")
    op.execute("DROP TABLE expired_jobs, erasures")
    # A sweep whose shared revision is gone can not be kept under the reference.
    op.execute(
        "DELETE FROM sweep_columns c WHERE revision_id IS NOT NULL"
        " AND NOT EXISTS (SELECT FROM adapter_revisions r WHERE r.id = c.revision_id)"
    )
    op.execute("ALTER TABLE sweep_columns ADD FOREIGN KEY (revision_id) REFERENCES adapter_revisions (id)")
    op.execute("DROP INDEX batches_tenant_id_finished_at")
    op.execute(
        "ALTER TABLE tenants DROP COLUMN retention_days, DROP COLUMN delete_requested_at, DROP COLUMN delete_due_at"
    )


class _Index(NamedTuple):
    name: str
    definition: str
    is_primary: bool

    def on(self, table: str) -> str:
        """Its statement for another table; unique it cannot be across partitions."""
        return re.sub(r"^CREATE (UNIQUE )?INDEX (\S+) ON (ONLY )?\S+", rf"CREATE INDEX \2 ON {table}", self.definition)


def _partition(table: str) -> None:
    """Puts a partitioned table in the place of a plain one, which becomes its first partition where it holds rows."""
    before = f"partitions.{table}_before"
    indexes, grants = _indexes(table), _grants(table)
    op.execute("DROP POLICY tenant ON " + table)
    op.execute("DROP POLICY work ON " + table)
    op.execute(f"REVOKE ALL ON {table} FROM medley_api, medley_work")
    op.execute(f"ALTER TABLE {table} SET SCHEMA partitions")
    op.execute(f"ALTER TABLE partitions.{table} RENAME TO {table}_before")
    op.execute(
        f"CREATE TABLE {table} (LIKE {before} INCLUDING ALL EXCLUDING INDEXES EXCLUDING STATISTICS)"
        " PARTITION BY RANGE (job_id)"
    )
    op.execute(f"ALTER TABLE {table} ADD PRIMARY KEY (job_id)")
    for index in indexes:
        if not index.is_primary:
            # Unique over all partitions is only what holds the id: (batch_id, seq) is so because whoever numbers
            # results holds the batch's row.
            op.execute(index.on(table))
            if "UNIQUE" in index.definition:
                op.execute(f"DROP INDEX partitions.{index.name}")
    _secure(table)
    op.execute(f"CREATE POLICY tenant ON {table} TO medley_api USING ({KEPT_JOB}) WITH CHECK ({MINE})")
    op.execute(f"CREATE POLICY work ON {table} TO medley_work USING (true) WITH CHECK (true)")
    for grant in grants:
        op.execute(f"GRANT {grant.what} ON {table} TO {grant.grantee}")
    spare = f"partitions.{table}_default"
    op.execute(f"CREATE TABLE {spare} (LIKE {table} INCLUDING ALL)")
    _secure(spare)
    op.execute(f"ALTER TABLE {table} ATTACH PARTITION {spare} DEFAULT")
    _attach(table, before, spare)


def _attach(table: str, before: str, spare: str) -> None:
    today = _rows("SELECT (statement_timestamp() AT TIME ZONE 'UTC')::date AS day")[0].day
    is_filled = bool(_rows(f"SELECT FROM {before} LIMIT 1"))
    if is_filled:
        past = _rows(f"SELECT medley_first_id(('{today}'::date + 1)::timestamp AT TIME ZONE 'UTC') AS id")[0].id
        names = ", ".join(
            row.attname
            for row in _rows(
                f"SELECT attname FROM pg_attribute WHERE attrelid = '{before}'::regclass AND attnum > 0"
                " AND NOT attisdropped AND attgenerated = ''"
            )
        )
        # Of hosts whose clock is wrong.
        op.execute(
            f"WITH moved AS (DELETE FROM {before} WHERE job_id >= '{past}' RETURNING {names})"
            f" INSERT INTO {spare} ({names}) SELECT * FROM moved"
        )
        op.execute(f"ALTER TABLE {table} ATTACH PARTITION {before} FOR VALUES FROM (MINVALUE) TO ('{past}')")
    else:
        op.execute(f"DROP TABLE {before}")
    op.execute(
        f"SELECT medley_make_partition('{table}', '{today}'::date + n)"
        f" FROM generate_series({int(is_filled)}, {AHEAD_DAYS}) AS n"
    )


def _join(table: str) -> None:
    """Puts a plain table with all its rows in the place of a partitioned one."""
    indexes, grants = _indexes(table), _grants(table)
    op.execute(f"CREATE TABLE {table}_plain (LIKE {table} INCLUDING ALL EXCLUDING INDEXES EXCLUDING STATISTICS)")
    names = ", ".join(
        row.attname
        for row in _rows(
            f"SELECT attname FROM pg_attribute WHERE attrelid = '{table}'::regclass AND attnum > 0"
            " AND NOT attisdropped AND attgenerated = ''"
        )
    )
    op.execute(f"INSERT INTO {table}_plain ({names}) SELECT {names} FROM {table}")
    op.execute(f"DROP TABLE {table}")
    op.execute(f"ALTER TABLE {table}_plain RENAME TO {table}")
    op.execute(f"ALTER TABLE {table} ADD PRIMARY KEY (job_id)")
    for index in indexes:
        if not index.is_primary:
            statement = index.on(table)
            is_unique = index.name == "job_results_batch_id_seq"
            op.execute(statement.replace("CREATE INDEX", "CREATE UNIQUE INDEX") if is_unique else statement)
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY tenant ON {table} TO medley_api USING ({MINE}) WITH CHECK ({MINE})")
    op.execute(f"CREATE POLICY work ON {table} TO medley_work USING (true) WITH CHECK (true)")
    for grant in grants:
        op.execute(f"GRANT {grant.what} ON {table} TO {grant.grantee}")


def _secure(table: str) -> None:
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY owner ON {table} TO medley_owner USING (true) WITH CHECK (true)")


def _rows(statement: str) -> list[Any]:
    return list(op.get_bind().execute(text(statement)).all())


def _indexes(table: str) -> list[_Index]:
    found = _rows(
        "SELECT c.relname, pg_get_indexdef(i.indexrelid) AS definition, i.indisprimary FROM pg_index i"
        f" JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = '{table}'::regclass ORDER BY c.relname"
    )
    return [_Index(row.relname, row.definition, row.indisprimary) for row in found]


def _grants(table: str) -> list[Any]:
    """(what, grantee) of everyone but the owner, on the table and on columns of it."""
    return _rows(
        "SELECT a.privilege_type AS what, a.grantee::regrole::text AS grantee FROM pg_class c, aclexplode(c.relacl) a"
        f" WHERE c.oid = '{table}'::regclass AND a.grantee <> c.relowner"
        " UNION ALL SELECT format('%s (%I)', a.privilege_type, t.attname), a.grantee::regrole::text"
        " FROM pg_class c JOIN pg_attribute t ON t.attrelid = c.oid, aclexplode(t.attacl) a"
        f" WHERE c.oid = '{table}'::regclass AND a.grantee <> c.relowner ORDER BY 2, 1"
    )


def _tables_without_owner() -> list[str]:
    found = _rows(
        "SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace AND c.relrowsecurity"
        " AND NOT EXISTS (SELECT FROM pg_policies p WHERE p.schemaname = 'public' AND p.tablename = c.relname"
        "  AND 'medley_owner' = ANY(p.roles)) ORDER BY 1"
    )
    return [row.relname for row in found]
