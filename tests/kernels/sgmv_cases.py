"""Random adapters in tile memory on the device, SGMV over them, and the same formula in float64 and in plain torch.

Knows the interface of `medley_worker.ops.sgmv` and nothing of its kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from medley.spec.base_models import BaseModel
from medley_worker.ops.lora_stage import SITES, TILE_RANKS, AdapterTiles, GroupShape
from medley_worker.ops.sgmv import SgmvBatch, SgmvLora, sgmv_apply
from medley_worker.ops.sgmv_layout import fragment_layout

GROUPS = ("qkv", "o", "gate_up", "down")
# Half the distance of 1 to the next number: what rounding the exact result may cost at the most.
ROUNDING_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
MAX_SHOWN = 8
# Around every multiple of 8, 16, 32 and 64 that a kernel may be cut at.
MIXED_RANKS = (1, 2, 3, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 40, 48, 63, 64, 65, 96, 100, 120, 127, 128)

Ranks = int | Mapping[str, int]  # of all sites, or site by site (a site that is left out is not adapted)
Span = tuple[int | None, int]  # of one sequence: its adapter (None: the base) and its new tokens


def base_model(
    hidden: int, inner: int, num_heads: int, num_kv_heads: int, head_dim: int, num_layers: int = 2
) -> BaseModel:
    """A decoder of this shape; what the LoRA path does not look at is filled in."""
    return BaseModel(
        architecture="LlamaForCausalLM",
        model_type="llama",
        num_layers=num_layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=128,
        max_model_len=4096,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
        layer_windows=(None,) * num_layers,
        qkv_bias=False,
        qk_norm=False,
        tie_word_embeddings=False,
        dtype="bfloat16",
        eos_token_ids=(2,),
        bos_token_id=1,
        weight_files=(),
    )


SMALL = base_model(256, 688, 4, 2, 64)


@dataclass(frozen=True)
class Pair:
    """One adapted linear layer: y += scale * (x @ a.T) @ b.T. a: [r, in], b: [out, r], on the device."""

    a: Tensor
    b: Tensor
    scale: float


class Adapters:
    """Random adapters of a model, packed into a pool, and the SGMV over them."""

    def __init__(
        self,
        model: BaseModel,
        ranks: Sequence[Ranks],
        dtype: torch.dtype,
        *,
        max_tokens: int = 512,
        max_adapters: int | None = None,
        seed: int = 0,
        mode: str | None = None,
    ) -> None:
        self.layout = fragment_layout(model)
        self.dtype = dtype
        self.ranks = [dict.fromkeys(SITES, r) if isinstance(r, int) else dict(r) for r in ranks]
        self._generator = torch.Generator().manual_seed(seed)
        self.pairs: list[dict[tuple[int, str], Pair]] = [self._random_pairs(r) for r in self.ranks]
        counts = [self._num_tiles(r) for r in self.ranks]
        num_tiles = sum(sum(c.values()) for c in counts)
        # Tiles are dealt out in a random order: no kernel may count on neighbours.
        deck = iter(torch.randperm(num_tiles, generator=self._generator).tolist())
        host = torch.zeros((num_tiles + 1, self.layout.tile_elements), dtype=dtype)
        self.tiles: list[AdapterTiles] = []
        for load_id, (pairs, count) in enumerate(zip(self.pairs, counts, strict=True)):
            dealt = {group: tuple(itertools.islice(deck, n)) for group, n in count.items()}
            scales = torch.zeros((model.num_layers, len(SITES)))
            for (layer, site), pair in pairs.items():
                scales[layer, SITES.index(site)] = pair.scale
                self._pack(host, dealt, layer, site, pair)
            masks = {shape.name: self._site_mask(shape, self.ranks[load_id]) for shape in self.layout.groups}
            self.tiles.append(AdapterTiles(load_id, dealt, scales.cuda(), masks))
        self.pool = host.cuda()
        self.lora = SgmvLora(self.layout, self.pool, max_tokens, max_adapters or len(ranks), mode)

    def batch(self, spans: Sequence[Span]) -> SgmvBatch | None:
        """The SgmvBatch of a step of these sequences, in this order; None where none has an adapter."""
        return self.lora.batch([None if a is None else self.tiles[a] for a, _ in spans], [n for _, n in spans])

    def apply(self, y: Tensor, x: Tensor, group: str, layer: int, batch: SgmvBatch | None) -> None:
        assert batch is not None, "no row of the step has an adapter"
        sgmv_apply(y, x, group, layer, batch)

    def run(self, spans: Sequence[Span], y: Tensor, x: Tensor, group: str, layer: int) -> Tensor:
        """y after one apply; y itself stays as it is. y: [T, sum out], x: [T, in]."""
        out = y.clone()
        self.apply(out, x, group, layer, self.batch(spans))
        return out

    def inputs(self, group: str, num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random (y [T, sum out], x [T, in]) on the device."""
        shape = self.layout.group(group)
        generator = torch.Generator().manual_seed(1000 + seed)
        x = torch.randn((num_tokens, shape.in_features), generator=generator)
        y = torch.randn((num_tokens, sum(shape.out_features)), generator=generator)
        return y.to(self.dtype).cuda(), x.to(self.dtype).cuda()

    def formula(
        self, spans: Sequence[Span], y: Tensor, x: Tensor, group: str, layer: int, dtype: torch.dtype
    ) -> Tensor:
        """y + scale * (x @ a.T) @ b.T segment by segment, computed and rounded in `dtype`."""
        shape = self.layout.group(group)
        out = y.to(dtype, copy=True)
        for adapter, rows in segments(spans).items():
            here = torch.tensor(rows, device=x.device)
            for columns, site in site_columns(shape):
                pair = self.pairs[adapter].get((layer, site))
                if pair is not None:
                    update = (x[here].to(dtype) @ pair.a.to(dtype).t()) @ pair.b.to(dtype).t()
                    out[here, columns] += update * pair.scale
        return out

    def assert_close(self, spans: Sequence[Span], got: Tensor, y: Tensor, x: Tensor, group: str, layer: int) -> None:
        """Each segment and site is at most twice as far from float64 as plain torch at this dtype, or one rounding.

        Far is the relative Frobenius error. Rows without an adapter are bit-equal to y's.
        """
        exact = self.formula(spans, y, x, group, layer, torch.float64)
        plain = self.formula(spans, y, x, group, layer, self.dtype)
        faults: list[str] = []
        for adapter, rows in segments(spans).items():
            here = torch.tensor(rows, device=x.device)
            for columns, site in site_columns(self.layout.group(group)):
                wanted = exact[here, columns]
                mine = _relative_error(got[here, columns], wanted)
                bound = max(2 * _relative_error(plain[here, columns], wanted), ROUNDING_UNIT[self.dtype])
                if not mine <= bound:  # NaN is a fault too
                    rank = self.ranks[adapter].get(site, 0)
                    faults.append(
                        f"adapter {adapter} (rank {rank}), {site} layer {layer}, {len(rows)} rows:"
                        f" error {mine:.2e}, allowed {bound:.2e}"
                    )
        more = f"\n... and {len(faults) - MAX_SHOWN} more" if len(faults) > MAX_SHOWN else ""
        assert not faults, f"{group}, {self.dtype}:\n" + "\n".join(faults[:MAX_SHOWN]) + more
        base = torch.tensor(base_rows(spans, len(y)), dtype=torch.long, device=y.device)
        assert_bits(got[base], y[base], "rows without an adapter")

    def check(self, spans: Sequence[Span], *, groups: Sequence[str] = GROUPS) -> None:
        """`assert_close` over these groups and all layers."""
        num_tokens = sum(n for _, n in spans)
        for group in groups:
            for layer in range(self.layout.num_layers):
                y, x = self.inputs(group, num_tokens, seed=layer)
                self.assert_close(spans, self.run(spans, y, x, group, layer), y, x, group, layer)

    def _random_pairs(self, ranks: Mapping[str, int]) -> dict[tuple[int, str], Pair]:
        pairs: dict[tuple[int, str], Pair] = {}
        for layer, shape in itertools.product(range(self.layout.num_layers), self.layout.groups):
            for site, out in zip(_sites(shape), shape.out_features, strict=True):
                rank = ranks.get(site, 0)
                if rank:
                    # Updates about as large as y, so that their error is not lost in y's.
                    a = torch.randn((rank, shape.in_features), generator=self._generator) * shape.in_features**-0.5
                    b = torch.randn((out, rank), generator=self._generator) * rank**-0.5
                    scale = 0.5 + 1.5 * float(torch.rand((), generator=self._generator))
                    pairs[layer, site] = Pair(a.to(self.dtype).cuda(), b.to(self.dtype).cuda(), scale)
        return pairs

    def _site_mask(self, shape: GroupShape, ranks: Mapping[str, int]) -> int:
        return sum(1 << i for i, site in enumerate(_sites(shape)) if ranks.get(site, 0))

    def _num_tiles(self, ranks: Mapping[str, int]) -> dict[str, int]:
        highest = {shape.name: max(ranks.get(site, 0) for site in _sites(shape)) for shape in self.layout.groups}
        return {group: -(-rank // TILE_RANKS) for group, rank in highest.items() if rank}

    def _pack(self, host: Tensor, dealt: Mapping[str, tuple[int, ...]], layer: int, site: str, pair: Pair) -> None:
        shape = next(g for g in self.layout.groups if site in _sites(g))
        in_group, a, b = _sites(shape).index(site), pair.a.cpu(), pair.b.cpu()
        for i, start in enumerate(range(0, len(a), TILE_RANKS)):
            ranks = slice(start, start + TILE_RANKS)
            self.layout.write(host[dealt[shape.name][i]], shape, in_group, layer, a[ranks], b[:, ranks])


def adapters_in(mode: str) -> Adapters:
    """bf16 adapters of ranks 1 to 128, and room for thousands of tokens."""
    if mode == "bulk" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the mode bulk needs a GPU of compute capability 9.0")
    return Adapters(SMALL, MIXED_RANKS, torch.bfloat16, max_tokens=8192, mode=mode)


def decode(adapters: Sequence[int | None]) -> list[Span]:
    """One new token each."""
    return [(adapter, 1) for adapter in adapters]


def segments(spans: Sequence[Span]) -> dict[int, list[int]]:
    """The token rows of each adapter that has any."""
    found: dict[int, list[int]] = {}
    row = 0
    for adapter, num_tokens in spans:
        if adapter is not None and num_tokens:
            found.setdefault(adapter, []).extend(range(row, row + num_tokens))
        row += num_tokens
    return found


def base_rows(spans: Sequence[Span], num_rows: int) -> list[int]:
    """The rows below `num_rows` that have no adapter; those past the spans' are among them."""
    taken = {row for rows in segments(spans).values() for row in rows}
    return [row for row in range(num_rows) if row not in taken]


def span_rows(spans: Sequence[Span]) -> list[list[int]]:
    """The token rows of each span."""
    ends = list(itertools.accumulate((n for _, n in spans), initial=0))
    return [list(range(begin, end)) for begin, end in itertools.pairwise(ends)]


def site_columns(shape: GroupShape) -> list[tuple[slice, str]]:
    """Where each site of a group lies in y's columns."""
    ends = list(itertools.accumulate(shape.out_features, initial=0))
    return [
        (slice(begin, end), site) for (begin, end), site in zip(itertools.pairwise(ends), _sites(shape), strict=True)
    ]


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, so that NaNs compare too."""
    return tensor.contiguous().view(torch.int16)


def assert_bits(got: Tensor, wanted: Tensor, what: str) -> None:
    """Raises AssertionError, naming the first rows that differ."""
    rows = (bits(got) != bits(wanted)).any(-1).nonzero()[:, 0].tolist()
    assert not rows, f"{what}: {len(rows)} of {len(got)} rows differ, the first: {rows[:MAX_SHOWN]}"


def _sites(shape: GroupShape) -> tuple[str, ...]:
    return SITES[shape.first_site : shape.first_site + shape.num_sites]


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted).norm() / wanted.norm())
