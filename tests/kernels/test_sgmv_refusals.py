"""SGMV refuses wrong arguments: the message names the argument, what it got and what it wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sgmv_cases import SMALL, Adapters, decode

from medley_worker.ops.kernels import KernelError
from medley_worker.ops.sgmv import SgmvLora

pytestmark = pytest.mark.gpu

Arguments = dict[str, Any]
WRONG: dict[str, tuple[str, Callable[[Arguments], Arguments]]] = {
    "x of another dtype": ("x", lambda a: a | {"x": a["x"].half()}),
    "y of another dtype": ("y", lambda a: a | {"y": a["y"].float()}),
    "x too narrow": ("x", lambda a: a | {"x": a["x"][:, :-8]}),
    "x too wide": ("x", lambda a: a | {"x": torch.cat((a["x"], a["x"]), 1)}),
    "y too narrow": ("y", lambda a: a | {"y": a["y"][:, :-8]}),
    "y of one dimension": ("y", lambda a: a | {"y": a["y"][0]}),
    "x with fewer rows than y": ("x", lambda a: a | {"x": a["x"][:-1]}),
    "x on the host": ("x", lambda a: a | {"x": a["x"].cpu()}),
    "y on the host": ("y", lambda a: a | {"y": a["y"].cpu()}),
    "x by columns": ("x", lambda a: a | {"x": a["x"].t().contiguous().t()}),
    "y by columns": ("y", lambda a: a | {"y": a["y"].t().contiguous().t()}),
    "an unknown group": ("group", lambda a: a | {"group": "attention"}),
    "a layer past the last": ("layer", lambda a: a | {"layer": 2}),
    "a negative layer": ("layer", lambda a: a | {"layer": -1}),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_wrong_arguments_are_refused_by_name(mixed: Adapters, what: str) -> None:
    name, change = WRONG[what]
    spans = decode([0, 5, 9, None])
    y, x = mixed.inputs("qkv", len(spans))
    batch = mixed.batch(spans)
    right: Arguments = {"y": y, "x": x, "group": "qkv", "layer": 0}
    with pytest.raises((ValueError, KernelError), match=rf"\b{name}\b.*got .*wanted "):
        mixed.apply(batch=batch, **change(right))
    # And what is right goes on.
    mixed.apply(batch=batch, **right)
    torch.cuda.synchronize()


def test_more_tokens_than_there_is_room_for_are_refused() -> None:
    adapters = Adapters(SMALL, [8, 8], torch.bfloat16, max_tokens=16)
    adapters.check([(0, 9), (1, 7)])
    with pytest.raises(ValueError, match=r"num_tokens.*got 17.*wanted .*16"):
        adapters.batch([(0, 9), (1, 8)])


def test_more_adapters_than_there_is_room_for_are_refused() -> None:
    adapters = Adapters(SMALL, [8] * 5, torch.bfloat16, max_adapters=4)
    adapters.check(decode([0, 1, 2, 3, 3]))
    with pytest.raises(ValueError, match=r"adapters.*got 5.*wanted .*4"):
        adapters.batch(decode([0, 1, 2, 3, 4]))


@pytest.mark.parametrize(
    "change",
    [lambda p: p.float(), lambda p: p.cpu(), lambda p: p[:, :-8], lambda p: p[0]],
    ids=["dtype", "device", "width", "dimensions"],
)
def test_a_wrong_pool_is_refused(mixed: Adapters, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"\bpool\b.*got .*wanted "):
        SgmvLora(mixed.layout, change(mixed.pool), 16, 4)
