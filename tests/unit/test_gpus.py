"""Which GPUs each worker of `medley up` has, with a driver that counts as CUDA's does and one that is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cuda_driver import make_driver

from medley.local.gpus import TooFewGpus, share_gpus, visible_gpus


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [(None, ("0", "1", "2", "3")), ("2,0", ("2", "0")), ("GPU-abc, GPU-def", ("GPU-abc", "GPU-def")), ("", ())],
)
def test_gpus_have_the_names_that_the_environment_gives_them(
    visible: str | None, wanted: tuple[str, ...], tmp_path: Path
) -> None:
    environ = make_driver(tmp_path, num_gpus=4)
    if visible is not None:
        environ["CUDA_VISIBLE_DEVICES"] = visible
    assert visible_gpus(environ) == wanted


def test_names_after_one_that_cuda_does_not_know_are_not_seen(tmp_path: Path) -> None:
    assert visible_gpus(make_driver(tmp_path, num_gpus=1) | {"CUDA_VISIBLE_DEVICES": "0,9,1"}) == ("0",)


def test_without_a_driver_that_can_be_loaded_there_are_no_gpus(tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").touch()
    assert visible_gpus(os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}) == ()


@pytest.mark.parametrize(
    ("device", "num_workers", "size", "wanted"),
    [
        ("cuda", 4, 1, ["a", "b", "c", "d"]),
        ("cuda", 2, 2, ["a,b", "c,d"]),
        ("cuda:1", 1, 3, ["b,c,d"]),
        ("cuda:2", 2, 1, ["c", "d"]),
    ],
)
def test_each_worker_has_gpus_of_its_own(device: str, num_workers: int, size: int, wanted: list[str]) -> None:
    shares = share_gpus("abcd", device, num_workers, size)
    assert shares == [{"CUDA_VISIBLE_DEVICES": names, "MEDLEY_DEVICE": "cuda"} for names in wanted]


@pytest.mark.parametrize(("device", "num_workers", "size"), [("cuda", 5, 1), ("cuda", 3, 2), ("cuda:1", 2, 2)])
def test_where_there_are_too_few_the_error_says_how_many_are_wanted(device: str, num_workers: int, size: int) -> None:
    with pytest.raises(TooFewGpus, match=r"got 4, wanted [56]: .*--workers or --tensor-parallel"):
        share_gpus("abcd", device, num_workers, size)


@pytest.mark.parametrize(
    ("share", "num_workers", "size", "wanted"),
    [
        (0.45, 4, 1, ["a", "b", "c", "d"]),  # none shares while there are enough
        (0.45, 6, 1, ["a", "b", "c", "d", "a", "b"]),
        (0.3, 5, 2, ["a,b", "c,d", "a,b", "c,d", "a,b"]),
        (0.9, 2, 2, ["a,b", "c,d"]),
    ],
)
def test_workers_with_a_share_of_a_gpu_take_turns(share: float, num_workers: int, size: int, wanted: list[str]) -> None:
    places = share_gpus("abcd", "cuda", num_workers, size, share)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == wanted


def test_no_more_workers_share_a_gpu_than_their_shares_leave_room_for() -> None:
    with pytest.raises(TooFewGpus, match=r"got 4, wanted 5: .*MEDLEY_GPU_SHARE"):
        share_gpus("abcd", "cuda", 9, 1, 0.45)
    with pytest.raises(TooFewGpus, match="got 4, wanted 5"):
        share_gpus("abcd", "cuda", 5, 1, 0.9)
