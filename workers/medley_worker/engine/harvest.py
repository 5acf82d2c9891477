"""What a step has brought, as outputs: ends of requests, and the new tokens of those that are streamed.

Ends the rows of requests that are done. Knows rows and the scheduler; no forward pass, no messages.
"""

from __future__ import annotations

import numpy as np

from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import Details, FinishReason
from medley_worker.engine.matchers import fault_of
from medley_worker.engine.pipeline import Drawn
from medley_worker.engine.requests import RequestOutput
from medley_worker.engine.rows import RowTable
from medley_worker.engine.scheduler import Scheduler
from medley_worker.engine.sequences import Sequence

New = tuple[tuple[int, ...], tuple[float, ...]]  # tokens drawn in this step, and their log-probabilities


def harvest(drawn: Drawn, rows: RowTable, scheduler: Scheduler) -> list[RequestOutput]:
    """The outputs of a step. Rows that have ended are freed."""
    outputs: list[RequestOutput] = []
    for row in drawn.bad_rows:
        error = JobError(code=ErrorCode.NUMERICAL, message="the model's logits hold NaN")
        outputs.append(finished(scheduler.end_row(row), None, error))
    for row in drawn.scored_rows:
        sequence = scheduler.end_row(row)
        is_scored = sequence.findings is not None and sequence.findings.num_continuation > 0
        outputs.append(finished(sequence, FinishReason.SCORED if is_scored else FinishReason.LENGTH))
    if rows.is_guided[drawn.rows].any():
        drawn, failed = _follow(drawn, rows)
        outputs += [finished(scheduler.end_row(row), None, error) for row, error in failed]
    is_over = drawn.is_stop | drawn.is_long
    is_told = is_over | rows.is_streamed[drawn.rows]
    if not is_told.any():
        return outputs
    for i in np.flatnonzero(is_told).tolist():
        row = int(drawn.rows[i])
        new: New = ((), ())
        if rows.is_streamed[row]:
            new = ((int(drawn.token_ids[i]),), (float(drawn.logprobs[i]),))
        if is_over[i]:
            reason = FinishReason.STOP if drawn.is_stop[i] else FinishReason.LENGTH
            outputs.append(finished(scheduler.end_row(row), reason, new=new))
        else:
            running = rows.sequences[row]
            assert running is not None
            num_generated = int(rows.num_known[row] - rows.prompt_len[row])
            outputs.append(RequestOutput(running.request_id, *new, details=_new_details(running, num_generated)))
    return outputs


def _follow(drawn: Drawn, rows: RowTable) -> tuple[Drawn, list[tuple[int, JobError]]]:
    """Take the new tokens to the grammars of their rows. Returns what was drawn but for rows that have failed, and why.

    A token that ends the text is not for the grammar to see: it was allowed to.
    """
    failed: list[tuple[int, JobError]] = []
    is_kept = np.ones(len(drawn.rows), np.bool_)
    for i in np.flatnonzero(rows.is_guided[drawn.rows]).tolist():
        row = int(drawn.rows[i])
        sequence = rows.sequences[row]
        assert sequence is not None
        assert sequence.matcher is not None
        fault = fault_of(sequence.matcher)
        if fault is None and not drawn.is_stop[i]:
            sequence.matcher.consume_token(int(drawn.token_ids[i]))
            fault = fault_of(sequence.matcher)
        if fault is not None:
            failed.append((row, JobError(code=ErrorCode.INVALID_GRAMMAR, message=fault)))
            is_kept[i] = False
    return drawn.where(is_kept), failed


def finished(
    sequence: Sequence, reason: FinishReason | None, error: JobError | None = None, *, new: New = ((), ())
) -> RequestOutput:
    """The end of a sequence that holds no row."""
    token_ids, logprobs, findings = sequence.output_ids, sequence.output_logprobs, sequence.findings
    if findings is not None and findings.num_continuation and error is None:
        token_ids, logprobs = findings.scores
    return RequestOutput(
        sequence.request_id,
        *new,
        is_finished=True,
        token_ids=tuple(token_ids.tolist()),
        logprobs=tuple(logprobs.tolist()),
        finish_reason=reason,
        error=error,
        details=findings.details() if findings is not None and error is None else None,
    )


def _new_details(sequence: Sequence, num_generated: int) -> Details | None:
    return None if sequence.findings is None else sequence.findings.new_details(1, num_generated)
