"""RMSNorm over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Semantics: y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last axis and in float32.

    x: [..., H]. weight: [H], or [n, H] for one weight a head. Returns x's shape and dtype.
    """
    normed = F.rms_norm(x.to(torch.float32), (x.shape[-1],), None, eps)
    return normed.to(x.dtype) * weight
