"""How fast workers are, from what they report: the step-time fit, and what one job takes of steps and prompt tokens.

A memory of observations like `sightings`, rebuilt by looking on. Times are not its business: totals come in as they
are reported, with the number of jobs that have left the worker since it was first seen.
"""

from __future__ import annotations

from uuid import UUID

from medley.dispatcher.step_time import StepTime, StepTimeFit, Totals

MEMORY_JOBS = 2_000.0  # jobs after which what an old one took weighs 1/e
MIN_JOBS = 8.0


class Pace:
    """`known`: the model where it is given and not to be fitted."""

    def __init__(self, known: StepTime | None = None) -> None:
        self._known = known
        self._fit = StepTimeFit()
        self._before: dict[UUID, tuple[Totals, int]] = {}
        self._jobs = self._steps = self._prompt_tokens = 0.0  # faded sums
        self._rows = self._adapters = 0.0

    @property
    def model(self) -> StepTime | None:
        """Of the pool's workers, which are taken for alike; None while too little was seen."""
        return self._known if self._known is not None else self._fit.model

    def see(self, worker: UUID, totals: Totals, num_finished: int) -> None:
        """Takes in a worker's report; one that is seen again changes nothing."""
        before = self._before.get(worker)
        if before is not None and before[0].steps == totals.steps:
            return
        self._before[worker] = (totals, num_finished)
        if before is None or totals.steps < before[0].steps:
            return
        done = totals.since(before[0])
        self._fit.add(done)
        num_jobs = num_finished - before[1]
        fade = max(0.0, 1.0 - num_jobs / MEMORY_JOBS)
        self._jobs = fade * self._jobs + num_jobs
        self._steps = fade * self._steps + done.rows  # a row is one job's step
        self._prompt_tokens = fade * self._prompt_tokens + done.prompt_tokens
        self._rows = fade * self._rows + done.rows
        self._adapters = fade * self._adapters + done.adapters

    def forget(self, worker: UUID) -> None:
        self._before.pop(worker, None)

    def jobs_per_s(self, max_num_seqs: int) -> float:
        """What a worker finishes with all its rows taken; 0 while that is not known."""
        model = self.model
        if model is None or self._jobs < MIN_JOBS or self._steps <= 0:
            return 0.0
        adapters = min(max_num_seqs, max_num_seqs * self._adapters / self._rows)
        return model.jobs_per_s(max_num_seqs, adapters, self._steps / self._jobs, self._prompt_tokens / self._jobs)
