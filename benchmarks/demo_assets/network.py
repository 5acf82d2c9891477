"""The tiny Llama and a stack of LoRA adapters over it, in plain torch for training.

Owns shapes and arithmetic. The names of its parameters are those of a Hugging Face Llama checkpoint. Knows
nothing of skills, training or files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.demo_assets.examples import VOCAB_SIZE

SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    num_layers: int = 3
    hidden: int = 128
    intermediate: int = 256
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5
    max_len: int = 256

    def site(self, name: str) -> tuple[int, int]:
        """(input width, output width) of a linear layer."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }[name]


@dataclass(frozen=True)
class LoraShape:
    """What one adapter adds: its rank, its scale's alpha, and the sites that it changes in every layer."""

    rank: int
    alpha: int
    sites: tuple[str, ...]


class LoraStack(nn.Module):
    """All adapters at once: A [N, in, R] and B [N, R, out] a layer and site, padded to the largest rank.

    Padding and sites left out are masked, so they stay zero and get no gradient.
    """

    def __init__(self, shape: Shape, adapters: list[LoraShape]) -> None:
        super().__init__()
        rank = max(adapter.rank for adapter in adapters)
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name in SITES:
            mask = torch.zeros(len(adapters), rank)
            for i, adapter in enumerate(adapters):
                if name in adapter.sites:
                    mask[i, : adapter.rank] = adapter.alpha / adapter.rank
            self.register_buffer(f"scale_{name}", mask, persistent=False)
            width_in, width_out = shape.site(name)
            for layer in range(shape.num_layers):
                a = torch.empty(len(adapters), width_in, rank).uniform_(-1, 1) / math.sqrt(width_in)
                self.a[f"{layer}_{name}"] = nn.Parameter(a)
                self.b[f"{layer}_{name}"] = nn.Parameter(torch.zeros(len(adapters), rank, width_out))

    def forward(self, x: Tensor, layer: int, name: str) -> Tensor:
        """x [N, n, S, in] -> what each adapter adds to its own rows [N, n, S, out]."""
        key = f"{layer}_{name}"
        scale = self.get_buffer(f"scale_{name}")
        low = torch.bmm(x.flatten(1, 2), self.a[key]) * scale[:, None, :]
        return torch.bmm(low, self.b[key]).view(*x.shape[:3], -1)


class RmsNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Linear(nn.Linear):
    """A linear layer that knows its place, so that adapters can add to it."""

    def __init__(self, shape: Shape, layer: int, name: str) -> None:
        super().__init__(*shape.site(name), bias=False)
        self.layer, self.name = layer, name

    def adapted(self, x: Tensor, lora: LoraStack | None) -> Tensor:
        y: Tensor = self(x)
        return y if lora is None else y + lora(x, self.layer, self.name)


class Attention(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(shape, layer, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], lora: LoraStack | None) -> Tensor:
        """x [N, n, S, hidden]; causal, grouped heads."""
        N, n, S, _ = x.shape

        def heads(y: Tensor) -> Tensor:  # [N, n, S, heads * D] -> [N * n, heads, S, D]
            return y.reshape(N * n, S, -1, self.shape.head_dim).transpose(1, 2)

        q = rotate(heads(self.q_proj.adapted(x, lora)), cos_sin)
        k = rotate(heads(self.k_proj.adapted(x, lora)), cos_sin)
        v = heads(self.v_proj.adapted(x, lora))
        groups = self.shape.num_heads // self.shape.num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(N, n, S, -1)
        return self.o_proj.adapted(y, lora)


class Mlp(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            Linear(shape, layer, name) for name in ("gate_proj", "up_proj", "down_proj")
        )

    def forward(self, x: Tensor, lora: LoraStack | None) -> Tensor:
        inner = F.silu(self.gate_proj.adapted(x, lora)) * self.up_proj.adapted(x, lora)
        return self.down_proj.adapted(inner, lora)


class Block(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape.hidden, shape.rms_norm_eps)
        self.self_attn = Attention(shape, layer)
        self.post_attention_layernorm = RmsNorm(shape.hidden, shape.rms_norm_eps)
        self.mlp = Mlp(shape, layer)

    def forward(self, x: Tensor, cos_sin: tuple[Tensor, Tensor], lora: LoraStack | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos_sin, lora)
        y: Tensor = self.mlp(self.post_attention_layernorm(x), lora)
        return x + y


class Decoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, shape.hidden)
        self.layers = nn.ModuleList(Block(shape, layer) for layer in range(shape.num_layers))
        self.norm = RmsNorm(shape.hidden, shape.rms_norm_eps)


class TinyLlama(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.lm_head = nn.Linear(shape.hidden, VOCAB_SIZE, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.08 / math.sqrt(2 * shape.num_layers) if deep else 0.08)

    def forward(self, ids: Tensor, lora: LoraStack | None = None, first: Tensor | None = None) -> Tensor:
        """ids [N, n, S] int64 -> logits [N, n, S, V]; row group i runs with adapter i of `lora`.

        `first` [N, n, hidden], where given, stands in place of the first token's embedding.
        """
        x = self.model.embed_tokens(ids)
        if first is not None:
            x = torch.cat((first[:, :, None], x[:, :, 1:]), dim=2)
        cos_sin = rope(self.shape, ids.shape[-1], ids.device)
        for block in self.model.layers:
            x = block(x, cos_sin, lora)
        logits: Tensor = self.lm_head(self.model.norm(x))
        return logits


def rope(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [S, D] of the rotary embedding, halves repeated as Hugging Face lays them out."""
    powers = torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim
    angles = torch.arange(length, device=device).float()[:, None] / shape.rope_theta**powers
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = cos_sin
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin
