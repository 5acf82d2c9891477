"""Matrix products whose rows do not depend on their neighbours.

On CPU in float32 a row's bits must not change with the number of rows beside it. Measured with torch 2.13 (MKL on
Intel and AMD processors with AVX-512), 1 to 8 threads, 1 to 1024 rows, the weight as [K, N] row-major and K <= 512:
`mm` gives the same bits from 12 rows on, `bmm` for every multiple of 4 rows, whatever N. Below 4 rows AMD's path is
another, one row is a gemv everywhere, and threads may split a product of one item at rows that are no multiple of
4. [N, K]-major weights differ below 16 rows, and from K = 1024 on the split of K depends on the rows and the threads.
So weights are [K, N], rows are padded, and K is cut into pieces of 512 that are added in order.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_ROWS = 16  # 12 were enough where it was measured; 16 holds for the other weight order too
ROW_QUANTUM = 4  # a batched product's rows are a multiple of it
MAX_DEPTH = 512  # the largest K of one product
# Below M x K x N = 400 torch's bmm takes a loop of its own (ATen LinearAlgebra.cpp), with other bits.
MIN_BATCHED_VOLUME = 400


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Semantics: y = x @ weight + bias. x: [T, K], weight: [K, N], bias: [N]. Returns [T, N] in x's dtype."""
    num_rows, depth = x.shape
    if num_rows < MIN_ROWS:
        x = F.pad(x, (0, 0, 0, MIN_ROWS - num_rows))
    if depth <= MAX_DEPTH:
        y = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
        return y[:num_rows]
    first, head = x[:, :MAX_DEPTH], weight[:MAX_DEPTH]
    y = torch.mm(first, head) if bias is None else torch.addmm(bias, first, head)
    for k in range(MAX_DEPTH, depth, MAX_DEPTH):
        y.addmm_(x[:, k : k + MAX_DEPTH], weight[k : k + MAX_DEPTH])
    return y[:num_rows]


def batched_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Semantics: out[i] = a[i] @ b[i]. a: [S, M, K] with M a multiple of 4, b: [S, K, N] row-major. Returns [S, M, N].

    out: written where given, contiguous (torch's bmm loops over i otherwise).
    """
    assert a.shape[1] % ROW_QUANTUM == 0, "other numbers of rows take other paths and give other bits"
    num_rows, depth = a.shape[1:]
    if num_rows * depth * b.shape[2] < MIN_BATCHED_VOLUME:
        enough = -(-MIN_BATCHED_VOLUME // (depth * b.shape[2] * ROW_QUANTUM)) * ROW_QUANTUM
        y = torch.bmm(F.pad(a, (0, 0, 0, enough - num_rows)), b)[:, :num_rows]
        return y.contiguous() if out is None else out.copy_(y)
    if depth <= MAX_DEPTH:
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    head_a, head_b = a[:, :, :MAX_DEPTH], b[:, :MAX_DEPTH]
    y = torch.bmm(head_a, head_b) if out is None else torch.bmm(head_a, head_b, out=out)
    for k in range(MAX_DEPTH, depth, MAX_DEPTH):
        y.baddbmm_(a[:, :, k : k + MAX_DEPTH], b[:, k : k + MAX_DEPTH])
    return y
