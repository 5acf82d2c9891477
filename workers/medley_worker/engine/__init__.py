"""The engine: scheduler, pages, adapter tiles and the step loop. It knows no jobs, no SQL, no Redis, no Celery.

The way of a step: scheduler.py decides (over rows.py and pages.py), runner.py computes, engine.py takes the
tokens. process.py is the loop around an Engine at the end of a socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medley_worker.engine.engine import Engine
    from medley_worker.engine.requests import Completion, Request, RequestOutput
    from medley_worker.engine.sequences import Refused

__all__ = ["Completion", "Engine", "Refused", "Request", "RequestOutput"]


def __getattr__(name: str) -> Any:
    """Import on first use: the scheduler and its tests need no torch."""
    if name == "Engine":
        from medley_worker.engine.engine import Engine

        return Engine
    if name == "Refused":
        from medley_worker.engine.sequences import Refused

        return Refused
    if name in __all__:
        from medley_worker.engine import requests

        return getattr(requests, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
