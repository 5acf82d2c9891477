"""SGMV against the same formula in float64: error, strides, streams, graphs, equal bits."""

from __future__ import annotations

import random

import pytest
import torch
from benchmarks.gpu.workloads import POPULARITIES, adapter_rows
from sgmv_cases import (
    GROUPS,
    MIXED_RANKS,
    SMALL,
    Adapters,
    Ranks,
    Span,
    adapters_in,
    assert_bits,
    base_model,
    base_rows,
    decode,
    span_rows,
)

from medley_worker.ops.sgmv import BLOCK_ROWS, SgmvBatch

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
# hidden, inner, heads, KV heads, head size: none of the widths fills a power-of-two tile.
ODD = {
    "88-264": base_model(88, 264, 11, 1, 24),
    "264-1032": base_model(264, 1032, 11, 1, 24),
    "1032-88": base_model(1032, 88, 43, 43, 24),
    "8-16": base_model(8, 16, 1, 1, 8),
}
DELAY_CYCLES = 20_000_000  # about 10 ms: enough for the host to run ahead

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])


@dtypes
def test_ranks_from_1_to_128_share_a_step(dtype: torch.dtype) -> None:
    adapters = Adapters(SMALL, MIXED_RANKS, dtype)
    rng = random.Random(0)
    rows: list[int | None] = [*range(len(MIXED_RANKS)), *rng.choices(range(len(MIXED_RANKS)), k=40)]
    rng.shuffle(rows)
    adapters.check(decode(rows))


@dtypes
@pytest.mark.parametrize("rank", MIXED_RANKS)
def test_each_rank_alone(rank: int, dtype: torch.dtype) -> None:
    adapters = Adapters(SMALL, [rank, rank], dtype)
    adapters.check(decode([0, 1, 1]))
    adapters.check([(0, 37), (1, 70)])


@dtypes
@pytest.mark.parametrize("shape", list(ODD))
def test_sizes_that_fill_no_tile(shape: str, dtype: torch.dtype) -> None:
    adapters = Adapters(ODD[shape], [1, 8, 13, 16, 40, 128], dtype)
    adapters.check(decode([0, 1, 2, 3, 4, 5, None, 5, 5, 0]))
    adapters.check([(3, 19), (None, 3), (5, 130), (0, 1), (2, 64)])


@dtypes
def test_the_widths_of_a_7b_model(dtype: torch.dtype) -> None:
    """A long K keeps its precision: 4096 and 11008 features in."""
    adapters = Adapters(base_model(4096, 11008, 32, 32, 128, num_layers=1), [16, 64, 8, 128], dtype)
    adapters.check(decode([0, 1, 2, 3, 0, None, 3]))
    adapters.check([(1, 200), (3, 1), (0, 65)])


@pytest.mark.parametrize("batch", [1, 7, 32, 64, 256])
@pytest.mark.parametrize("popularity", POPULARITIES)
def test_popularities_of_the_workloads(popularity: str, batch: int) -> None:
    rows = sorted(adapter_rows(batch, popularity, seed=1))  # as a step has them: the rows of an adapter side by side
    ranks = [(8, 16, 32, 64)[i % 4] for i in range(max(rows) + 1)]
    Adapters(SMALL, ranks, torch.bfloat16).check(decode(rows))


def test_sites_of_one_group_may_have_different_ranks_or_none() -> None:
    ranks: list[Ranks] = [
        {"q_proj": 24, "v_proj": 3, "up_proj": 5},
        {"k_proj": 8},
        {"down_proj": 128, "gate_proj": 16},
        {"o_proj": 5},
        16,
    ]
    adapters = Adapters(SMALL, ranks, torch.bfloat16)
    adapters.check(decode([0, 1, 2, 3, 4, None, 4, 0]))
    adapters.check([(0, 20), (1, 1), (2, 33), (3, 70), (4, 5)])


def test_segments_of_thousands_of_rows_beside_segments_of_one(mixed: Adapters) -> None:
    mixed.check([(23, 3001), (None, 5), (8, 1), (20, 517), (0, 64), (23, 1), (8, 2048), (1, 1)])


def test_empty_segments_change_nothing(mixed: Adapters) -> None:
    mixed.check([(3, 0), (5, 1), (7, 0), (5, 0), (9, 3), (None, 0), (11, 1), (2, 0)])


def test_a_step_without_adapters_has_no_batch(mixed: Adapters) -> None:
    assert mixed.batch([(None, 1), (None, 17)]) is None
    assert mixed.batch([]) is None


@pytest.mark.parametrize("group", GROUPS)
def test_rows_without_an_adapter_are_neither_read_nor_written(mixed: Adapters, group: str) -> None:
    spans: list[Span] = [(None, 3), (4, 1), (None, 1), (9, 33), (None, 20), (20, 1)]
    num_tokens = sum(n for _, n in spans)
    y, x = mixed.inputs(group, num_tokens + 9)  # 9 rows past the work list, as a padded graph has them
    base = base_rows(spans, len(y))
    y[base], x[base] = float("nan"), float("inf")
    got = mixed.run(spans, y, x, group, 0)
    mixed.assert_close(spans, got, y, x, group, 0)


@pytest.mark.parametrize("group", GROUPS)
def test_rows_may_lie_apart_in_memory(mixed: Adapters, group: str) -> None:
    """x and y as columns of wider tensors, whose other columns stay as they are."""
    spans: list[Span] = [(0, 1), (None, 2), (13, 1), (20, 70), (13, 1)]
    y, x = mixed.inputs(group, sum(n for _, n in spans))
    wide_x = torch.full((len(x), x.shape[1] + 24), float("nan"), dtype=x.dtype, device="cuda")
    wide_y = torch.full((len(y), y.shape[1] + 40), float("nan"), dtype=y.dtype, device="cuda")
    wide_x[:, 8 : 8 + x.shape[1]] = x
    wide_y[:, 16 : 16 + y.shape[1]] = y
    before = wide_y.clone()
    before[:, 16 : 16 + y.shape[1]] = 0
    mixed.apply(wide_y[:, 16 : 16 + y.shape[1]], wide_x[:, 8 : 8 + x.shape[1]], group, 1, mixed.batch(spans))
    got = wide_y[:, 16 : 16 + y.shape[1]].clone()
    assert_bits(got, mixed.run(spans, y, x, group, 1), "strided rows against rows side by side")
    wide_y[:, 16 : 16 + y.shape[1]] = 0
    assert_bits(wide_y, before, "columns beside y")


def test_work_is_ordered_on_the_callers_stream(mixed: Adapters) -> None:
    """x arrives late on a side stream, and what follows there sees the result."""
    spans = decode([0, 5, 12, None, 23, 5])
    y, x = mixed.inputs("qkv", len(spans))
    wanted = mixed.run(spans, y, x, "qkv", 0)
    late, out = torch.zeros_like(x), y.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(DELAY_CYCLES)
        late.copy_(x)
        mixed.apply(out, late, "qkv", 0, mixed.batch(spans))
        seen = out.clone()
    stream.synchronize()
    assert_bits(seen, wanted, "on a side stream")


class Captured:
    """All groups of both layers over static tensors in one CUDA graph, for up to `num_rows` rows."""

    def __init__(self, adapters: Adapters, num_rows: int, spans: list[Span]) -> None:
        self.adapters = adapters
        self.sites = [(group, layer) for group in GROUPS for layer in range(adapters.layout.num_layers)]
        self.x, self.y = {}, {}
        for group, layer in self.sites:
            self.y[group, layer], self.x[group, layer] = adapters.inputs(group, num_rows, seed=layer)
        batch = adapters.batch(spans)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._apply(batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._apply(batch)
        torch.cuda.synchronize()

    def _apply(self, batch: SgmvBatch | None) -> None:
        for group, layer in self.sites:
            self.adapters.apply(self.y[group, layer], self.x[group, layer], group, layer, batch)

    def replay(self, spans: list[Span], y: dict[tuple[str, int], torch.Tensor]) -> dict[tuple[str, int], torch.Tensor]:
        """Upload another work list, start from `y`, replay; waits for nothing."""
        self.adapters.batch(spans)
        for site in self.sites:
            self.y[site].copy_(y[site])
        self.graph.replay()
        return {site: self.y[site].clone() for site in self.sites}

    def eager(self, spans: list[Span], y: dict[tuple[str, int], torch.Tensor]) -> dict[tuple[str, int], torch.Tensor]:
        """What a replay must give."""
        batch = self.adapters.batch(spans)
        out = {site: y[site].clone() for site in self.sites}
        for site in self.sites:
            self.adapters.apply(out[site], self.x[site], *site, batch)
        return out


def random_spans(rng: random.Random, num_rows: int) -> list[Span]:
    """Decode rows of a few or of many adapters, some of the base, often fewer than the graph has rows."""
    known = rng.sample(range(len(MIXED_RANKS)), rng.choice([1, 2, 8, len(MIXED_RANKS)]))
    rows = [rng.choice([None, *known]) for _ in range(rng.randint(1, num_rows))]
    rows[0] = known[0]
    return decode(rows)


def test_a_captured_graph_serves_any_later_work_list(mixed: Adapters) -> None:
    num_rows = 48
    captured = Captured(mixed, num_rows, decode([3]))
    y = {site: tensor.clone() for site, tensor in captured.y.items()}
    rng = random.Random(2)
    for number in range(20):
        spans = random_spans(rng, num_rows)
        got, wanted = captured.replay(spans, y), captured.eager(spans, y)
        for site in captured.sites:
            assert_bits(got[site], wanted[site], f"replay {number}, {site}, {len(spans)} rows")
        mixed.assert_close(spans, got["o", 1], y["o", 1], captured.x["o", 1], "o", 1)


def test_two_steps_may_be_in_flight_with_a_work_list_each(mixed: Adapters) -> None:
    """The second list is uploaded before the device has begun the first step."""
    num_rows = 32
    captured = Captured(mixed, num_rows, decode([0, 1]))
    y = {site: tensor.clone() for site, tensor in captured.y.items()}
    rng = random.Random(3)
    for number in range(10):
        first, second = random_spans(rng, num_rows), random_spans(rng, num_rows)
        torch.cuda.synchronize()
        torch.cuda._sleep(DELAY_CYCLES)
        got = [captured.replay(first, y), captured.replay(second, y)]
        torch.cuda.synchronize()
        for spans, have in zip((first, second), got, strict=True):
            wanted = captured.eager(spans, y)
            torch.cuda.synchronize()
            for site in captured.sites:
                assert_bits(have[site], wanted[site], f"round {number}, {site}")


@pytest.mark.parametrize("group", GROUPS)
def test_bits_repeat_from_run_to_run(mixed: Adapters, group: str) -> None:
    spans = [*decode([*range(len(MIXED_RANKS)), None]), (20, 300), (5, 40)]
    y, x = mixed.inputs(group, sum(n for _, n in spans))
    first = mixed.run(spans, y, x, group, 0)
    for number in range(20):
        assert_bits(mixed.run(spans, y, x, group, 0), first, f"run {number}")


def permuted(spans: list[Span], order: list[int], *tensors: torch.Tensor) -> tuple[list[Span], list[torch.Tensor]]:
    """The spans in another order, with their rows of the tensors."""
    rows = span_rows(spans)
    index = torch.tensor([row for i in order for row in rows[i]], device="cuda")
    return [spans[i] for i in order], [tensor[index] for tensor in tensors]


@pytest.mark.parametrize("group", GROUPS)
def test_bits_do_not_depend_on_the_order_of_rows(mixed: Adapters, group: str) -> None:
    spans: list[Span] = [*decode([0, 3, 3, None, 9, 20, 23, 9]), (3, 2), (20, 129), (23, 33), *decode([20, None, 3])]
    y, x = mixed.inputs(group, sum(n for _, n in spans))
    wanted = mixed.run(spans, y, x, group, 0)
    rng = random.Random(4)
    for number in range(8):
        order = list(range(len(spans)))
        rng.shuffle(order)
        shuffled, (y_then, x_then, wanted_then) = permuted(spans, order, y, x, wanted)
        assert_bits(mixed.run(shuffled, y_then, x_then, group, 0), wanted_then, f"order {number}")


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 64, 200])
@pytest.mark.parametrize("group", GROUPS)
def test_bits_do_not_depend_on_neighbours(mixed: Adapters, group: str, num_tokens: int) -> None:
    """A sequence alone, and among others of its own adapter, of smaller and of larger ranks, in both phases."""
    company: list[list[Span]] = [
        decode([8]),
        decode([8] * 63),
        [*decode([23] * 5), *decode([0, 1, 2]), *decode([8, None, 8])],
        decode([*range(len(MIXED_RANKS))] * 10),
        [(8, 500)],
        [(23, 700), (8, 3), *decode([8, 8, 20])],
    ]
    own: Span = (8, num_tokens)
    y, x = mixed.inputs(group, num_tokens)
    wanted = mixed.run([own], y, x, group, 1)
    for number, others in enumerate(company):
        y_others, x_others = mixed.inputs(group, sum(n for _, n in others), seed=number)
        after = mixed.run([*others, own], torch.cat((y_others, y)), torch.cat((x_others, x)), group, 1)
        assert_bits(after[-num_tokens:], wanted, f"behind company {number}")
        before = mixed.run([own, *others], torch.cat((y, y_others)), torch.cat((x, x_others)), group, 1)
        assert_bits(before[:num_tokens], wanted, f"ahead of company {number}")


def test_the_mode_before_hopper_is_right() -> None:
    adapters = adapters_in("ring")
    adapters.check(decode([*range(len(MIXED_RANKS)), None, 3, 3, 23]))
    adapters.check([(23, 300), (None, 5), (8, 1), (20, 70), (0, 64), (8, 33)])


def test_hundreds_of_steps_through_one_graph_give_the_bits_of_launches(mixed: Adapters) -> None:
    captured = Captured(mixed, 48, decode([3]))
    y = {site: tensor.clone() for site, tensor in captured.y.items()}
    rng = random.Random(5)
    for number in range(250):  # 8 launches each
        spans = random_spans(rng, 48)
        got = captured.replay(spans, y)
        for group, layer in rng.sample(captured.sites, 2):
            wanted = mixed.run(spans, y[group, layer], captured.x[group, layer], group, layer)
            assert_bits(got[group, layer], wanted, f"replay {number}, {group}, layer {layer}")


@pytest.mark.parametrize("group", GROUPS)
def test_bits_do_not_depend_on_how_many_rows_an_item_holds(mixed: Adapters, group: str) -> None:
    spans: list[Span] = [(8, 1), (3, 5), (None, 2), (20, 8), (23, 9), (11, 31), (9, 33), (15, 100)]
    y, x = mixed.inputs(group, sum(n for _, n in spans))
    results = []
    for block_rows in BLOCK_ROWS:
        out = y.clone()
        tiles = [None if a is None else mixed.tiles[a] for a, _ in spans]
        batch = mixed.lora.batch(tiles, [n for _, n in spans], block_rows)
        assert batch is not None
        mixed.apply(out, x, group, 0, batch)
        results.append(out)
    for block_rows, got in zip(BLOCK_ROWS, results, strict=True):
        assert_bits(got, results[0], f"items of {block_rows} rows")


def test_bits_do_not_depend_on_where_tiles_lie() -> None:
    """The same adapters in other tiles of another pool."""
    alone = Adapters(SMALL, [40], torch.bfloat16)
    among = Adapters(SMALL, [40, 128, 16], torch.bfloat16)
    for key, pair in alone.pairs[0].items():
        assert torch.equal(pair.a, among.pairs[0][key].a)
        assert torch.equal(pair.b, among.pairs[0][key].b)
    spans = decode([0, 0, None])
    for group in GROUPS:
        y, x = alone.inputs(group, len(spans))
        assert_bits(among.run(spans, y, x, group, 1), alone.run(spans, y, x, group, 1), group)
