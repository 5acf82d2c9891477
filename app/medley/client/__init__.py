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
    BatchAdapter,
    BatchStatus,
    Completion,
    Counts,
    Delivery,
    Failure,
    JobStatus,
    Key,
    Result,
    Score,
    SweepDiff,
    SweepReport,
    UsageReport,
    Webhook,
)
from medley.client.webhooks import Webhooks
from medley.spec.webhooks import BadSignature
from medley.spec.webhooks import verify as verify_webhook

__all__ = [
    "APIError",
    "Adapter",
    "Adapters",
    "Authentication",
    "BadSignature",
    "Batch",
    "BatchAdapter",
    "BatchStatus",
    "Client",
    "Completion",
    "Conflict",
    "Connection",
    "Counts",
    "Delivery",
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
    "SweepDiff",
    "SweepReport",
    "Timeout",
    "TooLarge",
    "UsageReport",
    "Webhook",
    "Webhooks",
    "verify_webhook",
]
