"""Adapters that tenants share: grants, the lanes of jobs on others' adapters, and files that go when nobody uses them.

A lane is the queue of one revision for one tenant, so jobs on another tenant's adapter have a lane of their own; the
lanes of a tenant's own adapters stay what they were.

Revision ID: 0003
"""

from __future__ import annotations

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# That an adapter, a revision and a name belong together is held by foreign keys, which row-level security does not
# blind; a policy that looked at `adapters` would have to be looked at by the policy of `adapters`.
TABLES = """
ALTER TABLE tenants ADD UNIQUE (id, name);
ALTER TABLE adapters ADD UNIQUE (id, tenant_id);
ALTER TABLE adapter_revisions ADD UNIQUE (id, adapter_id);

-- The owner lets another tenant use an adapter. Names are kept beside ids, since neither may read the other's row.
CREATE TABLE adapter_grants (
    id uuid PRIMARY KEY,
    tenant_id uuid NOT NULL REFERENCES tenants (id) ON DELETE CASCADE,  -- the owner
    owner text NOT NULL,
    adapter_id uuid NOT NULL,
    revision_id uuid,                       -- null: every revision, those to come too
    grantee text NOT NULL REFERENCES tenants (name) ON UPDATE CASCADE ON DELETE CASCADE,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    revoked_at timestamptz,
    CHECK (grantee <> owner),
    FOREIGN KEY (tenant_id, owner) REFERENCES tenants (id, name) ON UPDATE CASCADE ON DELETE CASCADE,
    FOREIGN KEY (adapter_id, tenant_id) REFERENCES adapters (id, tenant_id) ON DELETE CASCADE,
    FOREIGN KEY (revision_id, adapter_id) REFERENCES adapter_revisions (id, adapter_id) ON DELETE CASCADE
);
CREATE UNIQUE INDEX adapter_grants_live ON adapter_grants (adapter_id, grantee, revision_id) NULLS NOT DISTINCT
    WHERE revoked_at IS NULL;
CREATE INDEX adapter_grants_grantee ON adapter_grants (grantee) WHERE revoked_at IS NULL;
CREATE INDEX adapter_grants_tenant_id ON adapter_grants (tenant_id);

ALTER TABLE adapter_revisions ADD COLUMN forgotten_at timestamptz;  -- its files have been deleted
CREATE INDEX adapter_revisions_digest ON adapter_revisions (digest);

ALTER TABLE jobs ADD COLUMN is_shared boolean NOT NULL DEFAULT false;   -- its adapter is another tenant's
ALTER TABLE jobs ALTER COLUMN lane SET EXPRESSION AS (
    CASE WHEN is_shared
        THEN encode(substring(sha256(uuid_send(tenant_id) || uuid_send(revision_id)) FROM 1 FOR 16), 'hex')::uuid
        ELSE coalesce(revision_id, tenant_id) END);
"""

# Whether a tenant may use a revision now: its own, or one that was granted. For those who see every tenant's rows.
MAY_USE = """
CREATE FUNCTION medley_may_use(tenant uuid, revision uuid) RETURNS boolean LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT EXISTS (
        SELECT FROM adapter_revisions r WHERE r.id = revision AND (r.tenant_id = tenant OR EXISTS (
            SELECT FROM adapter_grants g JOIN tenants t ON t.name = g.grantee
            WHERE g.adapter_id = r.adapter_id AND t.id = tenant AND g.revoked_at IS NULL
                AND (g.revision_id IS NULL OR g.revision_id = r.id))))
$$
"""

# Of the owner's rows the grantee sees what was granted, while it is.
GRANTED = "g.revoked_at IS NULL AND g.grantee = (SELECT t.name FROM tenants t WHERE t.id = (SELECT medley_tenant()))"


def upgrade() -> None:
    op.execute(TABLES)
    op.execute(MAY_USE)
    op.execute("REVOKE ALL ON FUNCTION medley_may_use(uuid, uuid) FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION medley_may_use(uuid, uuid) TO medley_work")
    op.execute("ALTER TABLE adapter_grants ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE adapter_grants FORCE ROW LEVEL SECURITY")
    mine = "tenant_id = (SELECT medley_tenant())"
    op.execute(f"CREATE POLICY tenant ON adapter_grants TO medley_api USING ({mine}) WITH CHECK ({mine})")
    op.execute("CREATE POLICY work ON adapter_grants TO medley_work USING (true) WITH CHECK (true)")
    op.execute(f"CREATE POLICY granted ON adapter_grants FOR SELECT TO medley_api USING ({GRANTED.replace('g.', '')})")
    op.execute(
        "CREATE POLICY granted ON adapters FOR SELECT TO medley_api USING (deleted_at IS NULL AND EXISTS"
        f" (SELECT FROM adapter_grants g WHERE g.adapter_id = adapters.id AND {GRANTED}))"
    )
    op.execute(
        "CREATE POLICY granted ON adapter_revisions FOR SELECT TO medley_api USING (EXISTS"
        " (SELECT FROM adapter_grants g WHERE g.adapter_id = adapter_revisions.adapter_id"
        f" AND (g.revision_id IS NULL OR g.revision_id = adapter_revisions.id) AND {GRANTED}))"
    )
    op.execute("GRANT SELECT, INSERT ON adapter_grants TO medley_api")
    op.execute("GRANT UPDATE (revoked_at) ON adapter_grants TO medley_api")
    op.execute("GRANT UPDATE (forgotten_at) ON adapter_revisions TO medley_api")
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON adapter_grants TO medley_work")


def downgrade() -> None:
    for table in ("adapters", "adapter_revisions"):
        op.execute(f"DROP POLICY granted ON {table}")
    op.execute("DROP FUNCTION medley_may_use(uuid, uuid)")
    op.execute("DROP TABLE adapter_grants")
    op.execute("ALTER TABLE jobs ALTER COLUMN lane SET EXPRESSION AS (coalesce(revision_id, tenant_id))")
    op.execute("ALTER TABLE jobs DROP COLUMN is_shared")
    op.execute("DROP INDEX adapter_revisions_digest")
    op.execute("ALTER TABLE adapter_revisions DROP COLUMN forgotten_at")
    op.execute("ALTER TABLE adapter_revisions DROP CONSTRAINT adapter_revisions_id_adapter_id_key")
    op.execute("ALTER TABLE adapters DROP CONSTRAINT adapters_id_tenant_id_key")
    op.execute("ALTER TABLE tenants DROP CONSTRAINT tenants_id_name_key")
