"""Scopes and rotation of keys, quotas of tenants, and the audit log.

Revision ID: 0002
"""

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

KEYS = """
ALTER TABLE api_keys
    ADD COLUMN name text CHECK (length(name) BETWEEN 1 AND 200),
    -- Keys made before there were scopes may go on doing all they could; a new one says what it may.
    ADD COLUMN scopes text[] NOT NULL DEFAULT '{read,submit,adapters,admin}'
        CHECK (scopes <@ '{read,submit,adapters,admin}' AND cardinality(scopes) > 0),
    ADD COLUMN last_used_at timestamptz,            -- within a minute
    ADD COLUMN replaces text REFERENCES api_keys (id);      -- the key that this one was rotated from
ALTER TABLE api_keys ALTER COLUMN scopes DROP DEFAULT;
-- Of a key and those that it was rotated into two live at the most: the old and the new.
CREATE UNIQUE INDEX api_keys_replaces ON api_keys (replaces) WHERE replaces IS NOT NULL AND revoked_at IS NULL;
"""

QUOTAS = """
-- What a tenant may have where it differs from the configuration; null: as configured.
CREATE TABLE tenant_limits (
    tenant_id uuid PRIMARY KEY REFERENCES tenants (id),
    queued_jobs bigint CHECK (queued_jobs >= 0),
    queued_bytes bigint CHECK (queued_bytes >= 0),
    adapters bigint CHECK (adapters >= 0),
    storage_bytes bigint CHECK (storage_bytes >= 0),
    requests_per_s double precision CHECK (requests_per_s > 0)
);

-- What a tenant has in the queue: jobs that have not ended, and the bytes of the prompts of unfinished batches.
-- Written by those who make and end jobs, in their transactions and after every other row.
CREATE TABLE tenant_usage (
    tenant_id uuid PRIMARY KEY REFERENCES tenants (id),
    queued_jobs bigint NOT NULL,
    queued_bytes bigint NOT NULL
) WITH (fillfactor = 50);

-- The batch's part of tenant_usage.queued_bytes; 0 once it has finished.
ALTER TABLE batches ADD COLUMN queued_bytes bigint NOT NULL DEFAULT 0;

-- The owner too sees tenants' rows only where a policy says so, or while it is not forced.
ALTER TABLE batches NO FORCE ROW LEVEL SECURITY;
INSERT INTO tenant_usage (tenant_id, queued_jobs, queued_bytes)
SELECT tenant_id, sum(total - succeeded - failed - cancelled - expired), 0
FROM batches WHERE finished_at IS NULL GROUP BY tenant_id;
ALTER TABLE batches FORCE ROW LEVEL SECURITY;
"""

# No reference to tenants: what was done outlives whom it was done to.
AUDIT = """
CREATE TABLE audit_log (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id uuid NOT NULL,
    key_id text,                            -- null: an operator at the database
    action text NOT NULL,
    object text NOT NULL,
    details jsonb NOT NULL DEFAULT '{}',
    request_id text,
    client_address text,
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX audit_log_tenant_id_id ON audit_log (tenant_id, id);

CREATE FUNCTION medley_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND current_setting('medley.erasing', true) <> '' THEN
        RETURN NULL;    -- a tenant is erased, by the owner's function
    END IF;
    RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log
    FOR EACH STATEMENT EXECUTE FUNCTION medley_append_only();
"""

TENANT_TABLES = ("tenant_limits", "tenant_usage", "audit_log")


def upgrade() -> None:
    for statements in (KEYS, QUOTAS, AUDIT):
        op.execute(statements)
    mine = "tenant_id = (SELECT medley_tenant())"
    for table in TENANT_TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY tenant ON {table} TO medley_api USING ({mine}) WITH CHECK ({mine})")
        op.execute(f"CREATE POLICY work ON {table} TO medley_work USING (true) WITH CHECK (true)")
        op.execute(f"CREATE POLICY operator ON {table} TO medley_owner USING (true) WITH CHECK (true)")
    # A tenant's admin key makes and revokes the tenant's keys; its secret and scopes cannot change.
    op.execute("GRANT INSERT ON api_keys TO medley_api")
    op.execute("GRANT UPDATE (expires_at, revoked_at, last_used_at) ON api_keys TO medley_api")
    op.execute("GRANT SELECT ON tenant_limits, tenant_usage, audit_log TO medley_api, medley_work")
    op.execute("GRANT INSERT ON tenant_usage, audit_log TO medley_api, medley_work")
    op.execute("GRANT UPDATE (queued_jobs, queued_bytes) ON tenant_usage TO medley_api, medley_work")
    op.execute("GRANT DELETE ON tenant_usage TO medley_work")


def downgrade() -> None:
    op.execute("DROP TABLE audit_log, tenant_usage, tenant_limits")
    op.execute("DROP FUNCTION medley_append_only()")
    op.execute("ALTER TABLE batches DROP COLUMN queued_bytes")
    op.execute("REVOKE INSERT ON api_keys FROM medley_api")
    op.execute("REVOKE UPDATE (expires_at, revoked_at, last_used_at) ON api_keys FROM medley_api")
    op.execute(
        "ALTER TABLE api_keys DROP COLUMN replaces, DROP COLUMN last_used_at, DROP COLUMN scopes, DROP COLUMN name"
    )
