"""Medley: batch inference for hundreds of LoRA adapters on one base model.

`import medley` gives a tenant's tools: `medley.Client` and the errors it raises.
"""

from medley.client import (
    APIError,
    Authentication,
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
)

__all__ = [
    "APIError",
    "Authentication",
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
]
