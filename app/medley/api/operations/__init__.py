"""The table of operations: every route that the service has, what it takes and what it answers, a module a subject.

A test holds it equal to the routes. The types here are those of answers that endpoints put together from others, and
of bodies that endpoints decode part by part.
"""

from __future__ import annotations

from medley.api.openapi import Operation
from medley.api.operations.adapters import ADAPTERS
from medley.api.operations.jobs import BATCHES, JOBS
from medley.api.operations.openai import OPENAI
from medley.api.operations.sweeps import SWEEPS
from medley.api.operations.tenants import KEYS, OPEN, REST
from medley.api.operations.webhooks import WEBHOOKS

OPERATIONS: tuple[Operation, ...] = (
    *OPEN,
    *JOBS,
    *BATCHES,
    *ADAPTERS,
    *SWEEPS,
    *KEYS,
    *WEBHOOKS,
    *REST,
    *OPENAI,
)
