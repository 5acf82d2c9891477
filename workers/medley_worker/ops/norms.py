"""RMSNorm over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last axis and in float32.

    x: [..., H]. weight: [H], or [n, H] for one weight a head. Returns x's shape and dtype.
    """
    wide = x.to(torch.float32)
    # By the norm: one pass over x where squares and their mean are two.
    length: Tensor = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale: Tensor = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * scale).to(x.dtype).mul_(weight)
