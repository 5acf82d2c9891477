"""Rotary position embedding: frequencies (plain and Llama 3.1's scaling) and their application."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medley.spec.base_models import RopeScaling


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """[D/2] float32 radians a position. Su et al. 2021, section 3.4.2; scaling as Llama 3.1's reference code.

    Scaling divides low frequencies by `factor`, keeps high ones, and blends between the two.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    low_len = scaling.original_max_len / scaling.low_freq_factor
    high_len = scaling.original_max_len / scaling.high_freq_factor
    wave_len = 2 * math.pi / frequencies
    scaled = torch.where(wave_len > low_len, frequencies / scaling.factor, frequencies)
    smooth = (scaling.original_max_len / wave_len - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    is_between = ~(wave_len < high_len) & ~(wave_len > low_len)
    return torch.where(is_between, blended, scaled)


def rope_angles(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos [T, 1, D], sin [T, 1, D/2]) for positions [T]; computed in float32, once a step."""
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies  # [T, D/2]
    cos = angles.cos().to(dtype)
    return torch.cat((cos, cos), -1).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Semantics: y = x * cos + rotate_half(x) * sin, per head. x: [T, n, D]. Returns a new [T, n, D]."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin, value=-1)
    y[..., half:].addcmul_(x[..., :half], sin)
    return y


def cos_sin_cache(frequencies: Tensor, num_positions: int) -> Tensor:
    """[num_positions, D] float32: row p holds the D/2 cosines of position p's angles, then their sines."""
    positions = torch.arange(num_positions, dtype=torch.float32, device=frequencies.device)
    angles = positions.unsqueeze(-1) * frequencies  # [num_positions, D/2]
    return torch.cat((angles.cos(), angles.sin()), -1)
