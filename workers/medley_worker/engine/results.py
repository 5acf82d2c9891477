"""What a forward pass has computed in one step, as plain arrays on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medley_worker.engine.sequences import Logprobs


@dataclass(frozen=True, slots=True)
class Tops:
    """The likeliest tokens at n places, best first; k is the most that any of them wants."""

    token_ids: npt.NDArray[np.int64]  # [n, k]
    logprobs: Logprobs  # [n, k]


@dataclass(frozen=True, slots=True)
class Scores:
    """The log-probabilities of the plan's targets [S], chunk by chunk in its order."""

    logprobs: Logprobs  # [S]
    is_best: npt.NDArray[np.bool_]  # [S]: no token is likelier there
    is_bad: npt.NDArray[np.bool_]  # [S]: the logits held NaN
    tops: Tops | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """The tokens drawn for `sampled`, in its order.

    is_bad: rows whose logits held NaN, None where there were none; their tokens mean nothing. tops: beside the tokens
    of those rows of `sampled` that want any (`RowTable.num_top`), None where none does. scores: None without targets.
    """

    token_ids: npt.NDArray[np.int64]  # [R]
    logprobs: Logprobs  # [R], of the model's own distribution, before any sampling parameter
    is_bad: npt.NDArray[np.bool_] | None
    tops: Tops | None = None
    scores: Scores | None = None
