"""The client library: all a tenant needs, over HTTP alone."""

from medley.client.adapters import Adapters
from medley.client.batches import Batch
from medley.client.client import Client
from medley.client.errors import (
    APIError,
    Authentication,
    Conflict,
    Connection,
    Forbidden,
    InvalidRequest,
    JobEnded,
    MedleyError,
    NotFound,
    OverLimit,
    Timeout,
    TooLarge,
)
from medley.client.jobs import Job
from medley.client.keys import Keys
from medley.client.sweeps import Sweep
from medley.client.types import (
    Adapter,
    BatchStatus,
    Completion,
    Counts,
    Failure,
    JobStatus,
    Key,
    Result,
    Score,
    SweepReport,
)

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
    "Forbidden",
    "InvalidRequest",
    "Job",
    "JobEnded",
    "JobStatus",
    "Key",
    "Keys",
    "MedleyError",
    "NotFound",
    "OverLimit",
    "Result",
    "Score",
    "Sweep",
    "SweepReport",
    "Timeout",
    "TooLarge",
]
