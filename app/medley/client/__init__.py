"""The client library: all a tenant needs, over HTTP alone."""

from medley.client.adapters import Adapters
from medley.client.batches import Batch
from medley.client.client import Client
from medley.client.errors import (
    APIError,
    Authentication,
    Conflict,
    Connection,
    InvalidRequest,
    JobEnded,
    MedleyError,
    NotFound,
    Timeout,
    TooLarge,
)
from medley.client.jobs import Job
from medley.client.sweeps import Sweep
from medley.client.types import Adapter, BatchStatus, Completion, Counts, Failure, JobStatus, Result, SweepReport

__all__ = [
    "APIError",
    "Adapter",
    "Adapters",
    "Authentication",
    "Batch",
    "BatchStatus",
    "Client",
    "Completion",
    "Conflict",
    "Connection",
    "Counts",
    "Failure",
    "InvalidRequest",
    "Job",
    "JobEnded",
    "JobStatus",
    "MedleyError",
    "NotFound",
    "Result",
    "Sweep",
    "SweepReport",
    "Timeout",
    "TooLarge",
]
