"""The tables as SQLAlchemy knows them, a module a subject. The migrations make them; a test holds the two equal.

What each table and column is for stands beside its DDL in `migrations/versions`.
"""

from medley.db.models import adapters, batches, fleet, jobs, openai, sweeps, tenants, webhooks
from medley.db.models.base import metadata

__all__ = ["adapters", "batches", "fleet", "jobs", "metadata", "openai", "sweeps", "tenants", "webhooks"]
