"""The greedy draw on CUDA: argmax, its log-probability and a check in one launch, where torch takes a dozen."""

from __future__ import annotations

import torch
from torch import Tensor

from medley_worker.ops.kernels import kernels
from medley_worker.ops.operators import register


def greedy(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, is_bad: Tensor, rows: Tensor, last_token: Tensor
) -> None:
    """Semantics: token_ids[i] = last_token[rows[i]] = argmax logits[i], the lowest of equal ones.

    logits: [R, V] float32, contiguous. Written: token_ids [R] int64; logprobs [R] float32, of that token in the
    log-softmax; is_bad [R] uint8, 1 where the row's log-sum-exp is no finite number; last_token [any] int64. rows:
    [R] int64. Tensors of one CUDA device; on the current stream; may be captured. Raises KernelError.
    """
    torch.ops.medley.greedy(logits, token_ids, logprobs, is_bad, rows, last_token)


def _greedy(
    logits: Tensor, token_ids: Tensor, logprobs: Tensor, is_bad: Tensor, rows: Tensor, last_token: Tensor
) -> None:
    device = logits.device
    num_rows, vocab_size = logits.shape
    if num_rows == 0:
        return
    kernels(torch.cuda.current_device() if device.index is None else device.index).greedy(
        logits.data_ptr(),
        num_rows,
        vocab_size,
        token_ids.data_ptr(),
        logprobs.data_ptr(),
        is_bad.data_ptr(),
        rows.data_ptr(),
        last_token.data_ptr(),
        torch.cuda.current_stream(device).cuda_stream,
    )


register(
    "greedy(Tensor logits, Tensor(a!) token_ids, Tensor(b!) logprobs, Tensor(c!) is_bad, Tensor rows,"
    " Tensor(d!) last_token)",
    _greedy,
)
