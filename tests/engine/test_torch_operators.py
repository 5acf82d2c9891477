"""Our CUDA kernels as operators of torch: what torch knows of them without a GPU."""

from __future__ import annotations

import pytest
import torch

from medley_worker.ops import greedy, sgmv  # noqa: F401  (they register the operators)


@pytest.mark.parametrize(
    ("name", "written"),
    [("sgmv", {"y"}), ("greedy", {"token_ids", "logprobs", "is_bad", "last_token"})],
)
def test_torch_knows_which_arguments_a_kernel_writes(name: str, written: set[str]) -> None:
    schema = getattr(torch.ops.medley, name).default._schema
    assert {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write} == written


def test_tensors_without_memory_pass_through() -> None:
    """As compilers trace a program."""
    y, x = torch.empty((4, 24), device="meta"), torch.empty((4, 8), device="meta")
    torch.ops.medley.sgmv(y, x, "qkv", 0, 0, 8)


def test_tensors_of_the_host_are_refused_by_device() -> None:
    y, x = torch.empty((4, 24)), torch.empty((4, 8))
    with pytest.raises(NotImplementedError, match=r"medley::sgmv.*CPU"):
        torch.ops.medley.sgmv(y, x, "qkv", 0, 0, 8)
