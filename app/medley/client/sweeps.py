"""A sweep as its submitter holds it: a batch that the service expands from prompts x adapters, with a report."""

from __future__ import annotations

from medley.client.batches import Batch
from medley.client.transport import Transport
from medley.client.types import BatchStatus, SweepReport


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
