"""Medley's data plane: an engine that decodes many LoRA adapters on one base model in one batch.

    from medley_worker import Engine, Request, SamplingParams

The names are looked up when first used, so that importing this package alone does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medley.spec.jobs import FinishReason
    from medley.spec.sampling import SamplingParams
    from medley_worker.engine import Completion, Engine, Refused, Request, RequestOutput

__all__ = ["Completion", "Engine", "FinishReason", "Refused", "Request", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "SamplingParams":
        from medley.spec.sampling import SamplingParams

        return SamplingParams
    if name == "FinishReason":
        from medley.spec.jobs import FinishReason

        return FinishReason
    if name in __all__:
        from medley_worker import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
