"""What peers take for the LoRA path of one decode step, measured on one H200 in November 2026.

vLLM 0.24.0's Triton kernels, torch 2.11, the 7B shape: 32 layers x 7 projections in one CUDA graph, bf16, weights of
all layers distinct.
"""

from __future__ import annotations

from typing import NamedTuple


class PeerRow(NamedTuple):
    """One figure of a peer, in ms."""

    rank: int
    batch: int
    popularity: str
    adapters: int
    ms: float


VLLM = (
    PeerRow(16, 1, "identical", 1, 1.64),
    PeerRow(16, 32, "identical", 1, 1.40),
    PeerRow(16, 64, "identical", 1, 1.50),
    PeerRow(16, 256, "identical", 1, 3.98),
    PeerRow(16, 8, "distinct", 8, 3.99),
    PeerRow(16, 16, "distinct", 16, 7.38),
    PeerRow(16, 32, "uniform", 6, 3.29),
    PeerRow(16, 32, "skewed", 8, 4.04),
    PeerRow(16, 32, "distinct", 32, 13.74),
    PeerRow(16, 64, "uniform", 8, 4.24),
    PeerRow(16, 64, "distinct", 64, 27.4),
    PeerRow(16, 128, "distinct", 128, 44.7),
    PeerRow(16, 256, "uniform", 16, 9.19),
    PeerRow(64, 32, "identical", 1, 1.72),
    PeerRow(64, 32, "distinct", 32, 24.9),
    PeerRow(64, 64, "distinct", 64, 54.4),
)
