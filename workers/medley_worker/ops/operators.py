"""Our kernels as operators of torch: profilers name them, compilers know what they write. Knows no kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

_library = torch.library.Library("medley", "FRAGMENT")  # type: ignore[no-untyped-call]


def register(schema: str, on_cuda: Callable[..., None]) -> None:
    """Define `torch.ops.medley.<name>` by its schema, as torch writes them. It returns nothing."""
    name = schema.partition("(")[0]
    _library.define(f"{schema} -> ()")  # type: ignore[no-untyped-call]
    _library.impl(name, on_cuda, "CUDA")  # type: ignore[no-untyped-call]
    _library.impl(name, lambda *_: None, "Meta")  # type: ignore[no-untyped-call]
