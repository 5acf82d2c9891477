"""Medley: batch inference for hundreds of LoRA adapters on one base model.

`import medley` gives a tenant's tools: `medley.Client`, the errors it raises, and
`medley.verify_webhook` for who receives its events.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

if not TYPE_CHECKING:  # a checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        # Servers and engines stand on this package too: the client is imported where it is first asked for.
        if name in __all__:
            import medley.client

            return getattr(medley.client, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
