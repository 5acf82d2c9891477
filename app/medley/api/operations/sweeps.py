"""Operations on sweeps: /v1/sweeps."""

from __future__ import annotations

import msgspec

from medley.api.diffs import BASE, Diff
from medley.api.openapi import Operation, Parameter
from medley.api.operations.parameters import BEFORE, TEXT, most
from medley.api.reports import Report
from medley.api.shapes import Sweep
from medley.api.sweep_bodies import ExtensionBody, SweepBody


class SweepPage(msgspec.Struct):
    """Sweeps, newest first. `next`: what `before` is for the next page, null on the last."""

    sweeps: list[Sweep]
    next: str | None


_DIFF_QUERY = (
    Parameter("with", "The other sweep, by id or name; without it, each adapter against the base.", TEXT, "yesterday"),
    Parameter("adapter", f"One column of the sweep; {BASE} is the base.", TEXT, "caesar-3"),
    Parameter("with_adapter", "The column that it is compared with.", TEXT, BASE),
    Parameter("seed", "Of the bootstrap.", {"type": "integer", "minimum": 0, "default": 0}, 0),
)

SWEEPS = [
    Operation(
        method="POST",
        path="/v1/sweeps",
        summary="Declare a sweep, or find the one of that name and definition",
        body=SweepBody,
        answers={201: Sweep, 200: Sweep},
        refusals=(409,),
        creates=True,
    ),
    Operation(
        method="GET",
        path="/v1/sweeps",
        summary="List sweeps",
        query=(BEFORE, most(1_000, 100)),
        answers={200: SweepPage},
    ),
    Operation(method="GET", path="/v1/sweeps/{sweep_id}", summary="Read a sweep", answers={200: Sweep}),
    Operation(
        method="POST",
        path="/v1/sweeps/{sweep_id}/extend",
        summary="Add prompts, adapters and seeds: only what is missing runs",
        body=ExtensionBody,
        answers={200: Sweep},
        refusals=(409,),
    ),
    Operation(
        method="GET",
        path="/v1/sweeps/{sweep_id}/diff",
        summary="Compare columns of two sweeps, or of one, over the prompts that both have",
        query=_DIFF_QUERY,
        answers={200: Diff},
        refusals=(409,),
    ),
    Operation(
        method="GET",
        path="/v1/sweeps/{sweep_id}/report",
        summary="Read a sweep's report, an adapter a column",
        answers={200: Report},
    ),
]
