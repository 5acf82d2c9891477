"""The LoRA op against a loop over segments, and its bits among neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from medley_worker.ops.lora import build_lora_batch, lora_apply
from medley_worker.ops.lora_stage import TILE_RANKS, AdapterTiles, GroupShape, LoraStage, TileLayout

LAYERS = 2
RANKS = {"one": 1, "eight": 8, "nine": 9, "forty": 40, "largest": 128, "more_eight": 8}


@dataclass
class World:
    """A layout with odd sizes, a pool, and adapters with their plain matrices."""

    layout: TileLayout
    stage: LoraStage
    adapters: dict[str, AdapterTiles]
    weights: dict[tuple[str, int, str, int], tuple[Tensor, Tensor]]  # adapter, layer, group, site -> A, B

    def naive(self, y: Tensor, x: Tensor, group: str, layer: int, names: list[str | None], counts: list[int]) -> None:
        """The same by a loop over segments, in float64."""
        shape, row = self.layout.group(group), 0
        for name, count in zip(names, counts, strict=True):
            column = 0
            for site, width in enumerate(shape.out_features):
                if name is not None and (name, layer, group, site) in self.weights:
                    a, b = self.weights[name, layer, group, site]
                    scale = float(self.adapters[name].scales[layer, shape.first_site + site])
                    delta = scale * (x[row : row + count].double() @ a.double() @ b.double())
                    y[row : row + count, column : column + width] += delta
                column += width
            row += count


@pytest.fixture(scope="module", params=[(40, (48, 16, 16)), (600, (24, 8, 8))], ids=["small", "deep"])
def world(request: pytest.FixtureRequest) -> World:
    in_features, outs = request.param
    layout = TileLayout(LAYERS, (GroupShape("qkv", 0, in_features, outs), GroupShape("o", 3, 24, (in_features,))))
    pool = torch.zeros(60, layout.tile_elements)
    generator = torch.Generator().manual_seed(7)
    adapters: dict[str, AdapterTiles] = {}
    weights: dict[tuple[str, int, str, int], tuple[Tensor, Tensor]] = {}
    free = iter(torch.randperm(59, generator=generator).tolist())
    for load_id, (name, rank) in enumerate(RANKS.items()):
        tiles: dict[str, tuple[int, ...]] = {}
        scales = torch.rand(LAYERS, 4, generator=generator) + 0.5
        for group in layout.groups:
            if name == "nine" and group.name == "o":
                continue
            tiles[group.name] = tuple(next(free) for _ in range(-(-rank // TILE_RANKS)))
            for site, width in enumerate(group.out_features):
                for layer in range(LAYERS):
                    a = torch.randn(group.in_features, rank, generator=generator)
                    b = torch.randn(rank, width, generator=generator)
                    weights[name, layer, group.name, site] = (a, b)
                    for i, tile in enumerate(tiles[group.name]):
                        r = slice(i * TILE_RANKS, min((i + 1) * TILE_RANKS, rank))
                        here, n = pool[tile : tile + 1], r.stop - r.start
                        layout.a_view(here, group)[0, layer, :, site, :n] = a[:, r]
                        layout.b_view(here, group, site)[0, layer, :n] = b[r]
        adapters[name] = AdapterTiles(load_id, tiles, scales, {g: (1 << layout.group(g).num_sites) - 1 for g in tiles})
    return World(layout, LoraStage(layout, pool), adapters, weights)


def run(world: World, x: Tensor, group: str, layer: int, names: list[str | None], counts: list[int]) -> Tensor:
    adapters = [None if name is None else world.adapters[name] for name in names]
    y = torch.zeros(len(x), sum(world.layout.group(group).out_features))
    lora_apply(y, x, group, layer, build_lora_batch(adapters, counts, world.stage))
    return y


BATCHES: list[tuple[list[str | None], list[int]]] = [
    (["one"], [1]),
    (["one", None, "eight"], [1, 1, 1]),
    ([*RANKS, None, *RANKS], [1] * 6 + [3] + [20] * 6),
    ([None, "largest", "forty", "largest"], [5, 70, 1, 2]),
    (["nine"] * 64, [1] * 64),
]


@pytest.mark.parametrize(("names", "counts"), BATCHES)
@pytest.mark.parametrize("group", ["qkv", "o"])
def test_the_batched_product_equals_a_loop_over_segments(
    world: World, names: list[str | None], counts: list[int], group: str
) -> None:
    x = torch.randn(sum(counts), world.layout.group(group).in_features, generator=torch.Generator().manual_seed(1))
    for layer in range(LAYERS):
        got = run(world, x, group, layer, names, counts)
        wanted = torch.zeros(got.shape, dtype=torch.float64)
        world.naive(wanted, x, group, layer, names, counts)
        assert (got - wanted).abs().max() <= 1e-5 * (1 + wanted.abs().max())


@pytest.mark.parametrize("num_neighbours", [2, 16, 63, 300])
def test_a_rows_result_has_the_same_bits_alone_and_among_others(world: World, num_neighbours: int) -> None:
    generator = torch.Generator().manual_seed(num_neighbours)
    kinds: list[str | None] = [None, *RANKS]
    for name in RANKS:
        x = torch.randn(num_neighbours + 1, world.layout.group("qkv").in_features, generator=generator)
        mine = num_neighbours // 2
        names = [kinds[int(i)] for i in torch.randint(len(kinds), (num_neighbours + 1,), generator=generator)]
        names[mine] = name
        among = run(world, x, "qkv", 1, names, [1] * len(names))
        alone = run(world, x[mine : mine + 1], "qkv", 1, [name], [1])
        assert torch.equal(among[mine], alone[0]), name


def test_rows_without_an_adapter_are_left_as_they_are(world: World) -> None:
    x = torch.randn(9, world.layout.group("qkv").in_features)
    assert build_lora_batch([None, None], [4, 5], world.stage) is None
    y = run(world, x, "qkv", 0, [None, "eight", None], [4, 1, 4])
    assert not y[[0, 1, 2, 3, 5, 6, 7, 8]].any()
    assert y[4].any()


def test_an_adapter_loaded_anew_is_not_taken_for_what_was_there(world: World) -> None:
    x = torch.randn(1, world.layout.group("qkv").in_features)
    old, other = world.adapters["eight"], world.adapters["more_eight"]
    before = run(world, x, "qkv", 0, ["eight"], [1])
    moved = AdapterTiles(999, other.tiles, other.scales, other.site_masks)
    y = torch.zeros_like(before)
    lora_apply(y, x, "qkv", 0, build_lora_batch([moved], [1], world.stage))
    assert torch.equal(y, run(world, x, "qkv", 0, ["more_eight"], [1]))
    assert not torch.equal(y, before)
    assert old.load_id != moved.load_id


def test_staged_copies_follow_any_order_of_steps(world: World) -> None:
    generator = torch.Generator().manual_seed(3)
    kinds: list[str | None] = [None, *RANKS]
    for _ in range(40):
        size = int(torch.randint(1, 80, (1,), generator=generator))
        names = [kinds[int(i)] for i in torch.randint(len(kinds), (size,), generator=generator)]
        counts = torch.randint(1, 4, (size,), generator=generator).tolist()
        x = torch.randn(sum(counts), 24, generator=generator)
        got = run(world, x, "o", 1, names, counts)
        world.stage.check_integrity()
        wanted = torch.zeros(got.shape, dtype=torch.float64)
        world.naive(wanted, x, "o", 1, names, counts)
        assert (got - wanted).abs().max() <= 1e-5 * (1 + wanted.abs().max())
