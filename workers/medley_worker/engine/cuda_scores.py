"""What a step on CUDA owes beyond its draws: scores of targets and the likeliest tokens, and their way to the host.

Steps of which nothing of the kind is asked launch nothing here. Everything runs on the step's stream; the results lie
in pinned memory of their own once the step's event is reached. Knows plans and logits; no graphs, no inputs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medley_worker.engine.plans import Rows, StepPlan
from medley_worker.engine.results import Scores, Tops
from medley_worker.engine.rows import RowTable
from medley_worker.engine.score_pass import Found, score_rows, targets_of, topped_rows
from medley_worker.models import Decoder
from medley_worker.ops.scoring import Best, best_tokens, score

Ints = npt.NDArray[np.int64]


class Asked:
    """Of one step. It is filled while the step is launched, and read after its event."""

    def __init__(self, plan: StepPlan, sampled: Rows, rows: RowTable, device: torch.device) -> None:
        self._device = device
        self._targets = targets_of(plan, rows)
        self._topped, self._num_top = topped_rows(sampled, rows)
        self._found: list[Found] = []  # in the targets' order
        self._best: list[Best] = []  # in the order of the rows that want them
        self._scores: Found | None = None  # on the host
        self._tops: Best | None = None  # on the host

    def score_trunk(self, decoder: Decoder, x: Tensor, residual: Tensor, *, num_padded: int) -> None:
        """Score every target. x, residual: [T, H], the trunk of a step with so many padded decode rows."""
        if self._targets is None:
            return
        # Targets lie in chunks, which come after the padding.
        at, token_ids = self._upload(self._targets.places + num_padded), self._upload(self._targets.token_ids)
        vocab_size = decoder.config.vocab_size
        found = score_rows(
            lambda part: decoder.head(x, residual, part), at, token_ids, self._targets.num_top, vocab_size
        )
        self._found.append(found)

    def find_tops(self, logits: Tensor) -> None:
        """Find the likeliest tokens of every row that wants them. logits: [R or more, V], of the sampled rows first."""
        if self._num_top:
            wanted = logits.index_select(0, self._upload(self._topped))
            self._best.append(best_tokens(wanted, self._num_top))

    def take_pass(self, first: int, logits: Tensor, num_sampled: int, logit_rows: Ints) -> None:
        """Score what one of a step's passes holds.

        logits: [P, V], of the step's tokens first .. first + P. logit_rows: the places in it of the sampled rows that
        come after `num_sampled` others. All rows are scored, wanted or not: another shape would give other bits.
        """
        num_rows = len(logits)
        if self._targets is not None:
            places = self._targets.places
            mine = np.flatnonzero((places >= first) & (places < first + num_rows))
            if len(mine):
                wanted = np.zeros(num_rows, np.int64)
                wanted[places[mine] - first] = self._targets.token_ids[mine]
                scored = score(logits, self._upload(wanted))
                at = self._upload(places[mine] - first)
                k = self._targets.num_top
                best = _select(best_tokens(logits, k), at) if k else None
                logprobs, is_best, is_nan = (column.index_select(0, at) for column in scored)
                self._found.append(Found(logprobs, is_best, is_nan, best))
        topped = self._topped[(self._topped >= num_sampled) & (self._topped < num_sampled + len(logit_rows))]
        if len(topped):
            at = self._upload(logit_rows[topped - num_sampled])
            self._best.append(_select(best_tokens(logits, self._num_top), at))

    def bring(self) -> None:
        """Copy what was found to the host, on the current stream."""
        if self._found:
            columns = [torch.cat(parts) for parts in zip(*(found[:3] for found in self._found), strict=True)]
            logprobs, is_best, is_nan = map(_to_host, columns)
            bests = [found.best for found in self._found if found.best is not None]
            self._scores = Found(logprobs, is_best, is_nan, _joined(bests) if bests else None)
        if self._best:
            self._tops = _joined(self._best)

    def tops(self) -> Tops | None:
        """Of the rows that want them, in the step's order; once the copy is done."""
        return None if self._tops is None else _tops(self._tops)

    def scores(self) -> Scores | None:
        """Of the plan's targets, in its order; once the copy is done."""
        found = self._scores
        if found is None:
            return None
        tops = None if found.best is None else _tops(found.best)
        return Scores(found.logprobs.numpy(), found.is_best.numpy(), found.is_nan.numpy(), tops)

    def _upload(self, values: Ints) -> Tensor:
        """On the device, from pinned memory, which torch keeps until the copy is done."""
        return torch.from_numpy(values).pin_memory().to(self._device, non_blocking=True)


def _select(best: Best, at: Tensor) -> Best:
    return Best(best.token_ids.index_select(0, at), best.logprobs.index_select(0, at))


def _joined(bests: list[Best]) -> Best:
    """On the host."""
    token_ids, logprobs = (torch.cat(columns) for columns in zip(*bests, strict=True))
    return Best(_to_host(token_ids), _to_host(logprobs))


def _tops(best: Best) -> Tops:
    return Tops(best.token_ids.numpy(), best.logprobs.numpy())


def _to_host(values: Tensor) -> Tensor:
    into = torch.empty(values.shape, dtype=values.dtype).pin_memory()
    into.copy_(values, non_blocking=True)
    return into
