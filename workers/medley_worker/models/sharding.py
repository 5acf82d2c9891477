"""One rank's share of a model: which of its numbers lie on which rank of a tensor-parallel group.

Heads and the MLP's inner columns are divided: q, k, v, gate and up by what they put out, o and down by what they
take in, so that a layer needs two sums and nothing else. A share is a decoder's shape itself, of fewer heads and a
narrower MLP. Embedding, last norm and LM head are rank 0's alone. Knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from medley.spec.base_models import BaseModel, LinearSite, linear_sites

WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`. part: its share's shape; the same on every rank."""

    rank: int
    size: int
    whole: BaseModel
    part: BaseModel

    @property
    def is_first(self) -> bool:
        """Whether tokens go in and logits come out here."""
        return self.rank == 0

    def outputs(self, site: LinearSite) -> slice:
        """Which of the whole site's outputs are this rank's."""
        if self.size == 1 or _takes_shares(site):
            return WHOLE
        if site.name in ("k_proj", "v_proj"):
            # Fewer heads than ranks: neighbours hold the same one.
            first = self.rank * self.whole.num_kv_heads // self.size
            return _span(first, self.part.num_kv_heads * self.part.head_dim, self.part.head_dim)
        return _span(self.rank, site.out_features // self.size)

    def inputs(self, site: LinearSite) -> slice:
        """Which of the whole site's inputs are this rank's."""
        if self.size == 1 or not _takes_shares(site):
            return WHOLE
        return _span(self.rank, site.in_features // self.size)

    def holds(self, tensor: str) -> bool:
        """Whether this rank has any of a tensor of the model, by its name."""
        return self.is_first or tensor.startswith("model.layers.")

    def cut(self, tensor: str) -> tuple[slice, ...]:
        """What this rank has of a tensor that it holds, axis by axis; linear weights are [out, in]."""
        for site in linear_sites(self.whole):
            if f".{site.path}." in tensor:
                return (self.outputs(site),) if tensor.endswith(".bias") else (self.outputs(site), self.inputs(site))
        return (WHOLE,)


def _takes_shares(site: LinearSite) -> bool:
    """Whether a site's input is what other sites of the same rank put out."""
    return site.group in ("o", "down")


def _span(index: int, width: int, step: int | None = None) -> slice:
    start = index * (width if step is None else step)
    return slice(start, start + width)


def shard_of(model: BaseModel, rank: int = 0, size: int = 1) -> Shard:
    """The share of one rank. Raises ValueError naming every number of the model that does not divide."""
    if size < 1:
        raise ValueError(f"tensor_parallel: got {size}, wanted 1 or more")
    faults: list[str] = []
    if model.num_heads % size:
        faults.append(f"a divisor of num_attention_heads ({model.num_heads})")
    if model.intermediate_size % size:
        faults.append(f"a divisor of intermediate_size ({model.intermediate_size})")
    if model.num_kv_heads % size and size % model.num_kv_heads:
        faults.append(f"a divisor or a multiple of num_key_value_heads ({model.num_kv_heads})")
    if faults:
        raise ValueError(f"tensor_parallel: got {size}, wanted {', and '.join(faults)}")
    part = msgspec.structs.replace(
        model,
        num_heads=model.num_heads // size,
        num_kv_heads=max(1, model.num_kv_heads // size),
        intermediate_size=model.intermediate_size // size,
    )
    return Shard(rank, size, model, part)
