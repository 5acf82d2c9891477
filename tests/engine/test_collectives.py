"""Sums over processes: each number's bits follow from its terms, wherever it lies and whatever lies beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

DEADLINE_S = 120.0
# Each rank's row lies at every place of tensors of many lengths.
_RANK = """
import os, sys
from pathlib import Path
import torch
from medley_worker.ops.collectives import RankGroup
meeting, rank, size, dtype = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), getattr(torch, sys.argv[4])
rows = [torch.randn(48, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(size)]
wanted = rows[0].float()
for row in rows[1:]:
    wanted = wanted + row.float()
wanted = wanted.to(dtype)
group = RankGroup(meeting, rank, size, torch.device("cpu"))
for num_rows in (1, 2, 3, 7, 16, 33):
    x = rows[rank].repeat(num_rows, 1)
    group.add(x)
    assert (x == wanted).all(), num_rows
    x.fill_(rank + 1)
    group.spread(x)
    assert (x == 1).all(), num_rows
os._exit(0)
"""


@pytest.mark.parametrize(("size", "dtype"), [(2, "float32"), (3, "float32"), (4, "bfloat16")])
def test_a_sum_is_that_of_the_ranks_in_their_order_at_every_place(size: int, dtype: str, tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", _RANK, str(tmp_path / "meeting"), str(rank), str(size), dtype])
        for rank in range(size)
    ]
    try:
        assert [rank.wait(DEADLINE_S) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()
