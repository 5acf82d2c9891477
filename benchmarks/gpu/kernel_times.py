"""`kernel-times.json`: the kernels of a decode step, by name: launches and microseconds a step. 7B shape.

From the profiler's trace of 16 steps in graphs. Kernels may overlap (programmatic launches do), so their sum may exceed
the step's device time; the row "step" has that, as the union of their times.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import click
import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.results import Figure, Row, Run, part_options
from benchmarks.gpu.step import Case, ModelRows, rows_of

KEY = ("batch", "lora", "kernel")
CASES = (Case("7b", 32, "none"), Case("7b", 32, "distinct"), Case("7b", 64, "none"), Case("7b", 64, "distinct"))
NEW = (40, 56)  # new tokens of the two profiled runs: their difference is 16 steps
MAX_NAME = 90
LEAST_US = 1.0  # a step; what takes less is "others"
START_S, ROW_S = 60.0, 12.0

Spans = dict[str, list[tuple[float, float]]]


def trace(rows: ModelRows, case: Case, num_new: int) -> Spans:
    """Device activity of one run, by kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        rows.generate(case, num_new)
        torch.cuda.synchronize()
    found: Spans = defaultdict(list)
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA:
            found[short_name(event.name)].append((event.time_range.start, event.time_range.end))
    return found


def short_name(name: str) -> str:
    """A kernel's name without its return type and parameters."""
    plain = re.sub(r"^void ", "", name).replace("(anonymous namespace)::", "")
    return re.sub(r"\((?!.*<).*$", "", plain)[:MAX_NAME]


def busy_us(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals: kernels may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total


def kernel_rows(case: Case, few: Spans, many: Spans) -> list[Row]:
    """What the longer run has beyond the shorter one, a step.

    A kernel that both launch as often is of their prompts, which do not take the same time twice.
    """
    steps = NEW[1] - NEW[0]
    in_steps = [kernel for kernel in many if len(many[kernel]) > len(few.get(kernel, []))]

    def row(kernel: str, launches: float, us: float) -> Row:
        at = {"batch": case.batch, "lora": case.lora, "kernel": kernel}
        return at | {"launches": round(launches / steps, 1), "us": round(us / steps, 1)}

    def busy(spans: Spans) -> float:
        return busy_us(span for kernel in in_steps for span in spans.get(kernel, []))

    found = []
    for kernel in in_steps:
        us = sum(e - s for s, e in many[kernel]) - sum(e - s for s, e in few.get(kernel, []))
        found.append(row(kernel, len(many[kernel]) - len(few.get(kernel, [])), us))
    found.sort(key=lambda r: -r["us"])
    large = [r for r in found if r["us"] >= LEAST_US]
    others = [r for r in found if r["us"] < LEAST_US]
    whole = row("step", 0, busy(many) - busy(few)) | {"launches": round(sum(r["launches"] for r in found), 1)}
    rest = row("others", 0, 0) | {
        "launches": round(sum(r["launches"] for r in others), 1),
        "us": round(sum(r["us"] for r in others), 1),
    }
    return [whole, *large, rest]


@click.command()
@part_options
def main(run: Run) -> None:
    """Profile decode steps by kernel."""
    figure = Figure("kernel-times", KEY, run, notes=["7b shape, bf16, random weights, adapters of rank 16"])
    wanted = [case for case in CASES if figure.wants(batch=case.batch, lora=case.lora, kernel="step")]
    if not wanted or not run.has_time_for(START_S):
        return
    with rows_of("7b", wanted) as (rows, fitting):
        for case in fitting:
            if not run.has_time_for(ROW_S):
                return
            rows.generate(case, NEW[0])  # loads adapters
            for row in kernel_rows(case, *(trace(rows, case, num_new) for num_new in NEW)):
                figure.add(row)


if __name__ == "__main__":
    main()
