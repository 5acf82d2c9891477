"""What GPU figures rest on and needs no GPU: workloads, floors, and how rows of a result file are kept."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from benchmarks.gpu.floors import step_floor_s
from benchmarks.gpu.kernel_times import busy_us, kernel_rows, short_name
from benchmarks.gpu.lora import in_situ_ms
from benchmarks.gpu.plot import best, points
from benchmarks.gpu.results import Figure, Run, gpu_name
from benchmarks.gpu.shapes import adapter_weight_bytes, base_model
from benchmarks.gpu.step import Case
from benchmarks.gpu.workloads import POPULARITIES, adapter_counts, adapter_rows, bulk, punica

DEVICE = "NVIDIA H200"


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 32, 64, 256])
def test_every_row_has_an_adapter_and_every_adapter_a_row(popularity: str, num_rows: int) -> None:
    counts = adapter_counts(num_rows, popularity)
    assert sum(counts) == num_rows
    assert min(counts) > 0
    rows = adapter_rows(num_rows, popularity)
    assert [rows.count(i) for i in range(len(counts))] == counts


@pytest.mark.parametrize(
    ("num_rows", "popularity", "num_adapters"),
    [(32, "uniform", 6), (32, "skewed", 8), (256, "skewed", 13), (256, "uniform", 16), (256, "distinct", 256)],
)
def test_popularities_have_the_papers_numbers_of_adapters(num_rows: int, popularity: str, num_adapters: int) -> None:
    assert len(adapter_counts(num_rows, popularity)) == num_adapters


def test_a_popularity_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="popularity: got 'even', wanted one of identical"):
        adapter_counts(8, "even")


@pytest.mark.parametrize("popularity", ["none", "identical", "distinct"])
def test_punicas_requests_have_the_same_lengths_whatever_the_popularity(popularity: str) -> None:
    jobs = punica(256, 1024, popularity, 32000)
    assert sum(job.num_new for job in jobs) == 121_901
    assert all(len(job.prompt) + job.num_new <= 1024 for job in jobs)
    assert {job.adapter is None for job in jobs} == {popularity == "none"}


def test_a_bulk_evaluation_gives_each_adapter_as_many_jobs() -> None:
    jobs = bulk(2048, 256, 32000)
    assert {[job.adapter for job in jobs].count(i) for i in range(256)} == {8}
    assert {64, 256} >= {min(len(job.prompt) for job in jobs), max(len(job.prompt) for job in jobs)}


@pytest.mark.parametrize(("batch", "floor_ms"), [(1, 3.14), (32, 3.85), (64, 4.57), (128, 6.03)])
def test_a_decode_steps_floor_is_its_bytes(batch: int, floor_ms: float, tmp_path: Path) -> None:
    """7B: 13.2 GB of weights, and 0.5 MB of keys and values a token, at 4.24 TB/s."""
    model = base_model("7b", tmp_path)
    assert step_floor_s(model, batch, ctx=184) * 1e3 == pytest.approx(floor_ms, abs=0.01)


def test_adapters_add_their_bytes_to_the_floor(tmp_path: Path) -> None:
    model = base_model("7b", tmp_path)
    assert adapter_weight_bytes(model, 16) == pytest.approx(80e6, rel=0.01)
    without = step_floor_s(model, 32, ctx=184)
    distinct = step_floor_s(model, 32, ctx=184, adapter_rows=[1] * 32, rank=16)
    assert (distinct - without) * 1e3 == pytest.approx(0.60, abs=0.01)


def test_many_rows_are_bound_by_arithmetic(tmp_path: Path) -> None:
    model = base_model("7b", tmp_path)
    assert step_floor_s(model, 2048, ctx=0) == pytest.approx(2 * 2048 * 6.607e9 / 750e12, rel=0.01)


def test_rows_are_kept_from_run_to_run(tmp_path: Path) -> None:
    run = Run(tmp_path / "out", again=False, deadline=time.monotonic() + 60)
    figure = Figure("step", ("model", "batch"), run, device=DEVICE)
    figure.add({"model": "7b", "batch": 1, "ms": 4.0})
    figure.add({"model": "7b", "batch": 8, "ms": 5.0})
    later = Figure("step", ("model", "batch"), run, device=DEVICE)
    assert not later.wants(model="7b", batch=8)
    assert later.wants(model="7b", batch=16)
    assert later.get(model="7b", batch=8) == {"model": "7b", "batch": 8, "ms": 5.0}
    document = json.loads((tmp_path / "out" / "h200-step.json").read_text())
    assert document["machine"]["gpu"] == DEVICE
    assert {"what", "machine", "date", "versions", "command", "notes", "rows"} == set(document)


def test_rows_that_are_measured_again_replace_those_that_were_there(tmp_path: Path) -> None:
    first = Figure("step", ("batch",), Run(tmp_path, again=False, deadline=0), device=DEVICE)
    for batch in (1, 8):
        first.add({"batch": batch, "ms": 4.0})
    again = Figure("step", ("batch",), Run(tmp_path, again=True, deadline=0), device=DEVICE)
    assert again.wants(batch=8)
    again.add({"batch": 8, "ms": 3.0})
    assert not again.wants(batch=8)
    assert json.loads(again.path.read_text())["rows"] == [{"batch": 1, "ms": 4.0}, {"batch": 8, "ms": 3.0}]


def test_a_part_stops_when_its_budget_is_spent(tmp_path: Path) -> None:
    run = Run(tmp_path, again=False, deadline=time.monotonic() + 10)
    assert run.has_time_for(5)
    assert not run.has_time_for(15)


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA L40S", "l40s")],
)
def test_a_files_name_says_which_gpu_it_was(device: str, name: str) -> None:
    assert gpu_name(device) == name


def test_device_time_counts_kernels_that_overlap_once() -> None:
    assert busy_us([]) == 0
    assert busy_us([(10, 12), (0, 4), (3, 5), (1, 2), (12, 13)]) == 8


def test_the_plot_takes_a_ranks_rows_and_the_lowest_for_each_number_of_adapters() -> None:
    rows = [
        {"rank": 16, "batch": 32, "adapters": 8, "ms": 0.9},
        {"rank": 16, "batch": 8, "adapters": 8, "ms": 0.6},
        {"rank": "mix", "batch": 8, "adapters": 8, "ms": 0.1},
        {"rank": 16, "batch": 1, "adapters": 1, "ms": 0.4},
    ]
    assert points(rows, "ms") == [(1, 0.4), (8, 0.6), (8, 0.9)]
    assert best(points(rows, "ms")) == [(1, 0.4), (8, 0.6)]


def test_a_kernel_goes_by_its_name_without_types() -> None:
    name = "void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>(__nv_bfloat16*, float)"
    assert short_name(name) == "flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>"
    assert short_name("nvjet_tst_192x8_64x8_2x1_v_bz_TNT") == "nvjet_tst_192x8_64x8_2x1_v_bz_TNT"


def test_kernel_times_are_those_of_the_steps_that_the_longer_run_has_more() -> None:
    short = {"norm": [(0.0, 100.0)], "prompt": [(1000.0, 1400.0)]}
    long = {"norm": [(0.0, 100.0), (200.0, 520.0)], "copy": [(300.0, 304.0)], "prompt": [(1000.0, 1380.0)]}
    rows = kernel_rows(Case("7b", 32, "none"), short, long)
    assert [(row["kernel"], row["launches"], row["us"]) for row in rows] == [
        ("step", 0.2, 20.0),
        ("norm", 0.1, 20.0),
        ("others", 0.1, 0.2),
    ]


def test_what_adapters_add_to_a_whole_step_is_read_from_the_steps_rows(tmp_path: Path) -> None:
    steps = tmp_path / "h200-step.json"
    assert in_situ_ms(steps, 16, 32, "distinct") is None
    rows = [
        {"model": "7b", "batch": 32, "lora": "none", "ms": 5.0},
        {"model": "7b", "batch": 32, "lora": "distinct", "ms": 6.4},
        {"model": "8b", "batch": 32, "lora": "distinct", "ms": 9.9},
        {"model": "7b", "batch": 64, "lora": "distinct", "ms": 7.8},
    ]
    steps.write_text(json.dumps({"rows": rows}))
    assert in_situ_ms(steps, 16, 32, "distinct") == 1.4
    assert in_situ_ms(steps, 16, 32, "skewed") is None
    assert in_situ_ms(steps, 16, 64, "distinct") is None
    assert in_situ_ms(steps, 64, 32, "distinct") is None
