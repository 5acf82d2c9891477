"""Medley: batch inference for hundreds of LoRA adapters on one base model.

`import medley` gives a tenant's tools: `medley.Client`, the errors it raises, and
`medley.verify_webhook` for who receives its events.
"""

from medley.client import (
    APIError,
    Authentication,
    BadSignature,
    Client,
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
    verify_webhook,
)

__all__ = [
    "APIError",
    "Authentication",
    "BadSignature",
    "Client",
    "Conflict",
    "Connection",
    "Forbidden",
    "InvalidRequest",
    "JobEnded",
    "MedleyError",
    "NotFound",
    "OverLimit",
    "Timeout",
    "TooLarge",
    "verify_webhook",
]
