"""A sweep as its submitter holds it: a batch that the service expands from prompts x adapters, with a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from medley.client.batches import Batch
from medley.client.transport import Transport
from medley.client.types import BatchStatus, SweepDiff, SweepReport


def prompt_rows(prompts: Sequence[str | Mapping[str, Any]], expected: Sequence[str] | None) -> list[dict[str, Any]]:
    """Prompts as they travel. Raises ValueError unless there is one expected answer for each, or none at all."""
    if isinstance(prompts, str):
        raise TypeError("prompts: got one text, wanted a sequence of them")
    rows = [{"prompt": p} if isinstance(p, str) else dict(p) for p in prompts]
    if expected is not None:
        if len(expected) != len(rows):
            raise ValueError(f"expected: got {len(expected)} answers, wanted one for each of {len(rows)} prompts")
        for row, answer in zip(rows, expected, strict=True):
            row["expected"] = answer
    return rows


class Sweep(Batch):
    """A declared sweep; it is a batch too, and is followed, cancelled and paused as one."""

    def __init__(self, transport: Transport, status: BatchStatus, *, is_resumed: bool = False) -> None:
        super().__init__(transport, status)
        self.is_resumed = is_resumed  # it was there already, and goes on

    @property
    def name(self) -> str:
        assert self.status.sweep is not None
        return self.status.sweep.name

    def report(self) -> SweepReport:
        """Exact match per adapter over what has ended so far, the base beside it."""
        return self._transport.get(SweepReport, f"/v1/sweeps/{self.id}/report")

    def extend(
        self,
        prompts: Sequence[str | Mapping[str, Any]] = (),
        *,
        expected: Sequence[str] | None = None,
        adapters: Sequence[str] = (),
        include_base: bool = False,
        seeds: Sequence[int] = (),
    ) -> BatchStatus:
        """Adds prompts, adapters (names and patterns), the base, seeds; what is there already is left as it is.

        Only the missing cells run. The same again adds nothing. Raises InvalidRequest, and Conflict where the sweep
        was cancelled or its deadline has passed.
        """
        body = {
            "prompts": prompt_rows(prompts, expected),
            "adapters": [adapters] if isinstance(adapters, str) else list(adapters),
            "include_base": include_base,
            "seeds": list(seeds),
        }
        self.status = self._transport.post(BatchStatus, f"/v1/sweeps/{self.id}/extend", body)
        return self.status

    def diff(
        self,
        other: Sweep | str | None = None,
        *,
        adapter: str | None = None,
        with_adapter: str | None = None,
        seed: int | None = None,
    ) -> SweepDiff:
        """Paired statistics over the prompts that both sides have: see `DiffColumn`.

        With another sweep (itself, its id or name) each adapter is compared with itself there, else with this
        sweep's base; `adapter` and `with_adapter` choose one on each side, "(base)" for the base. seed: of the
        bootstrap.
        """
        with_sweep = other.id if isinstance(other, Sweep) else other
        params = {"with": with_sweep, "adapter": adapter, "with_adapter": with_adapter, "seed": seed}
        return self._transport.get(SweepDiff, f"/v1/sweeps/{self.id}/diff", params)
