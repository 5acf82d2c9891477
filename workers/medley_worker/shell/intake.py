"""Intake: ids from the inbox become jobs in the table, with their inputs, tokens and adapter's folder.

One thread, one query a take. What cannot run for a reason of its own ends here, with an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from uuid import UUID

import msgspec
import structlog
from sqlalchemy import Connection

from medley.db.ends import End, Result
from medley.db.inputs import Assigned, Continuation, fetch_inputs
from medley.db.inputs import assigned as rows_assigned
from medley.objects import StoreError
from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import JobState
from medley.spec.wire import AdapterRef, JobKey, WorkItem
from medley_worker.shell.adapter_folders import AdapterFolders, Coming
from medley_worker.shell.feed import Feed
from medley_worker.shell.held import Held, HeldJobs, Phase
from medley_worker.shell.inbox import Inbox
from medley_worker.shell.results import Results
from medley_worker.shell.text import TextCodec
from medley_worker.shell.transactions import Outage, Transactions, Unreachable

MAX_TAKE = 512  # ids of one query; with the longest prompts allowed their inputs are some tens of MB
TURN_S = 1.0

log = structlog.get_logger()


class Intake:
    """accepts: whether the worker takes jobs now."""

    def __init__(
        self,
        transactions: Transactions,
        worker: UUID,
        inbox: Inbox,
        held: HeldJobs,
        feed: Feed,
        results: Results,
        preparation: Preparation,
        *,
        accepts: Callable[[], bool],
    ) -> None:
        self._transactions = transactions
        self._worker = worker
        self._inbox = inbox
        self._held = held
        self._feed = feed
        self._results = results
        self._preparation = preparation
        self._accepts = accepts
        self._outage = Outage("fetching inputs")

    def run(self) -> None:
        """Take jobs in for ever, on a thread of its own."""
        while True:
            ids = self._inbox.take(MAX_TAKE, TURN_S)
            if ids:
                self._take(ids)
            self._preparation.folders.release(self._held.adapter_paths)

    def _take(self, ids: list[UUID]) -> None:
        # While the worker does not accept, the look for missed rows gives back what is assigned to it.
        wanted = self._preparation.folders.not_awaiting(self._held.not_held(ids))
        if not wanted or not self._accepts():
            return

        def fetch(conn: Connection) -> list[Assigned]:
            return fetch_inputs(conn, self._worker, wanted)

        try:
            assigned = self._transactions.run(fetch)
        except Unreachable as error:  # the look brings the ids again
            self._outage.begin(error)
            return
        except msgspec.MsgspecError as error:
            self._take_apart(wanted, error)
            return
        self._outage.end()
        jobs, ends = self._preparation.prepare(assigned)
        taken = {held.key for held in self._held.hold(jobs)}
        self._results.put([end for end in ends if JobKey(end.job, end.attempt) in taken])
        self._feed.offer()

    def _take_apart(self, ids: list[UUID], error: msgspec.MsgspecError) -> None:
        """A row among `ids` holds what this version cannot read: halve until it is found, and fail that job alone."""
        if len(ids) > 1:
            self._take(ids[: len(ids) // 2])
            self._take(ids[len(ids) // 2 :])
            return
        log.error("inputs.unreadable", job=ids[0].hex, reason=str(error))
        attempts = dict(self._transactions.insist("failing a job", lambda conn: rows_assigned(conn, self._worker)))
        if ids[0] in attempts:
            key = JobKey(ids[0], attempts[ids[0]])
            failure = JobError(code=ErrorCode.ENGINE, message=f"the job's stored sampling cannot be read: {error}")
            if self._held.hold([Held(key, phase=Phase.ENDING)]):
                self._results.put([Result(job=key.job, attempt=key.attempt, state=JobState.FAILED, error=failure)])


def _ending(job: Assigned) -> Held:
    return Held(JobKey(job.job, job.attempt), phase=Phase.ENDING)


def _end(job: Assigned, state: JobState, error: JobError | None = None) -> Result:
    """The end of a job of which nothing is computed: it has used no token."""
    return Result(job=job.job, attempt=job.attempt, state=state, error=error)


_UNREADABLE = JobError(code=ErrorCode.ENGINE, message="prompt: the model's tokenizer cannot read it")


class Preparation:
    """Turns inputs into what the engine takes. max_model_len: of the loaded engine, None before it is."""

    def __init__(self, codec: TextCodec, folders: AdapterFolders, max_model_len: Callable[[], int | None]) -> None:
        self._codec = codec
        self._max_model_len = max_model_len
        self.folders = folders

    def prepare(self, assigned: Sequence[Assigned]) -> tuple[list[Held], list[Result]]:
        """The jobs for the table, and the results of those among them (ENDING) that cannot run.

        Left out are jobs whose adapter is on its way to this machine.
        """
        live = [job for job in assigned if not job.is_cancelled]
        texts = [job for job in live if job.prompt_token_ids is None and job.continuation is None]
        # A chat template writes special tokens itself: those of the tokenizer would stand there twice.
        tokens = self._tokens([job for job in texts if not job.is_templated], add_special_tokens=True)
        tokens |= self._tokens([job for job in texts if job.is_templated], add_special_tokens=False)
        jobs: list[Held] = []
        ends: list[Result] = []
        for job in assigned:
            if job.is_cancelled:
                jobs.append(_ending(job))
                ends.append(_end(job, JobState.CANCELLED))
                continue
            ids, num_continuation = job.prompt_token_ids, 0
            if job.continuation is not None:
                ids, num_continuation = self._pair(job, job.continuation)
            elif ids is None:
                ids = tokens.get(job.job)
            try:
                ready = _UNREADABLE if ids is None else self._item(job, ids, num_continuation)
            except Coming:
                continue
            if isinstance(ready, JobError):
                jobs.append(_ending(job))
                ends.append(_end(job, JobState.FAILED, ready))
            else:
                jobs.append(Held(ready.key, ready, job.step_limit, tenant=job.tenant))
        return jobs, ends

    def _tokens(self, jobs: Sequence[Assigned], *, add_special_tokens: bool) -> dict[UUID, tuple[int, ...]]:
        """The tokens of each prompt; those that the tokenizer refuses are left out, found by halves."""
        prompts = [job.prompt or "" for job in jobs]
        try:
            encoded = self._codec.encode(prompts, add_special_tokens=add_special_tokens)
        except Exception as error:  # the Rust binding raises plain Exception
            if len(jobs) > 1:
                middle = len(jobs) // 2
                first = self._tokens(jobs[:middle], add_special_tokens=add_special_tokens)
                return first | self._tokens(jobs[middle:], add_special_tokens=add_special_tokens)
            # Without the error's text, which may quote the prompt.
            log.error("prompt.unreadable", job=jobs[0].job.hex, error=type(error).__name__)
            return {}
        return {job.job: tuple(ids) for job, ids in zip(jobs, encoded, strict=True)}

    def _pair(self, job: Assigned, continuation: Continuation) -> tuple[tuple[int, ...] | None, int]:
        """Prompt and continuation as one, and how many tokens of it are the continuation; None where unreadable."""
        prompt = job.prompt or "" if job.prompt_token_ids is None else job.prompt_token_ids
        after = continuation.text or "" if continuation.token_ids is None else continuation.token_ids
        try:
            before, scored = self._codec.encode_pair(prompt, after)
        except Exception as error:
            log.error("prompt.unreadable", job=job.job.hex, error=type(error).__name__)
            return None, 0
        return (*before, *scored), len(scored)

    def _item(self, job: Assigned, ids: tuple[int, ...], num_continuation: int) -> WorkItem | JobError:
        for is_barred, end in ((job.is_quarantined, End.quarantined()), (job.is_revoked, End.revoked())):
            if is_barred and end.error is not None:
                return end.error
        if job.continuation is not None and not 0 < num_continuation < len(ids):
            which = "continuation" if num_continuation == 0 else "prompt"
            return JobError(code=ErrorCode.INVALID_TOKEN, message=f"{which}: got no token of its own, wanted 1 or more")
        is_drawn = num_continuation == 0 and job.sampling.max_tokens > 0
        max_model_len = self._max_model_len()
        if max_model_len is not None and len(ids) + is_drawn > max_model_len:
            return JobError(
                code=ErrorCode.PROMPT_TOO_LONG,
                message=f"prompt: got {len(ids)} tokens, wanted at most {max_model_len - is_drawn}",
            )
        adapter = None
        if job.revision is not None:
            try:
                path = str(self.folders.path(job.digest or "", job.job))
            except (StoreError, OSError) as error:
                log.error("adapter.unavailable", job=job.job.hex, revision=job.revision.hex, reason=str(error))
                return JobError(
                    code=ErrorCode.ADAPTER_UNAVAILABLE,
                    message=f"the files of adapter revision {job.revision.hex} are not in the worker's store",
                )
            adapter = AdapterRef(job.tenant, job.revision, path)
        return WorkItem(
            key=JobKey(job.job, job.attempt),
            prompt_token_ids=ids,
            adapter=adapter,
            sampling=job.sampling,
            checkpoint=job.checkpoint,
            want_progress=bool(job.sampling.stop) and is_drawn,
            priority=job.priority,
            num_continuation=num_continuation,
        )
