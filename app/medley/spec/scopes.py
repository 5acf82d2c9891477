"""Scopes: what an API key may do. One word an endpoint, so a refusal can name what was wanted."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class Scope(StrEnum):
    READ = "read"  # look at jobs, batches, sweeps, results, adapters, limits
    SUBMIT = "submit"  # make, cancel, pause and resume jobs, batches and sweeps
    ADAPTERS = "adapters"  # upload and delete adapters
    ADMIN = "admin"  # manage keys and read the audit log; it can make keys of any scope, so it holds every scope


def covers(held: Iterable[str], wanted: Scope) -> bool:
    """Whether a key that holds these scopes may do what wants `wanted`."""
    return not {wanted, Scope.ADMIN}.isdisjoint(held)
