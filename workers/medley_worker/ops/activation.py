"""The gated activation of an MLP."""

from __future__ import annotations

import torch
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """Semantics: y = silu(gate) * up. gate_up: [T, 2 F], gate first. Returns [T, F].

    Spelled with `exp`, because torch's own silu takes another path for the last few numbers of a loop, so that
    a value's bits would depend on where it stands.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    y = torch.exp(-gate)
    y.add_(1)
    torch.div(gate, y, out=y)
    return y.mul_(up)
