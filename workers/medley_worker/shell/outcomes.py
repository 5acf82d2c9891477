"""What the engine says, turned into what becomes of jobs: results, releases, and who would be suspect.

Runs on the engine link's thread, a list of messages at a time, so that text is decoded in batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from medley.db.ends import Result
from medley.db.queue import Release
from medley.spec.jobs import Details, FinishReason, JobState
from medley.spec.wire import (
    Abort,
    Asleep,
    Awake,
    Batch,
    EngineStats,
    Finished,
    FromEngine,
    Progress,
    Ready,
    Released,
    Running,
)
from medley_worker.shell.feed import Feed
from medley_worker.shell.held import Held, HeldJobs
from medley_worker.shell.report import Report
from medley_worker.shell.results import Results
from medley_worker.shell.text import TextCodec
from medley_worker.stops import StopWatch


class Outcomes:
    """Acts on what an engine says of jobs."""

    def __init__(
        self,
        codec: TextCodec,
        held: HeldJobs,
        feed: Feed,
        results: Results,
        report: Report,
    ) -> None:
        self._codec = codec
        self._held = held
        self._feed = feed
        self._results = results
        self._report = report

    def take(self, messages: Sequence[FromEngine]) -> None:
        """Act on `messages`, in order as far as order matters (within one job)."""
        finished: list[Finished] = []
        released: list[Released] = []
        batch: Batch | None = None
        for message in messages:
            match message:
                case Finished():
                    finished.append(message)
                case Running(keys=keys):
                    self._held.announce(keys)
                case Progress():
                    self._progress(message)
                case Released():
                    released.append(message)
                case EngineStats():
                    self._report.engine_says(message)
                case Batch():
                    batch = message
                case Ready() | Asleep() | Awake():
                    pass  # of the engine, not of jobs: its controller hears it
        if finished:
            self._finish(finished)
        if released:
            self._release(released)
        if batch is not None:
            self._report.batch_is(self._held.composition(batch))
        if (finished or released) and self._held.has_waiting:
            self._feed.offer()

    def _finish(self, finished: list[Finished]) -> None:
        results: list[Result] = []
        plain: list[tuple[Finished, int]] = []  # whose text is decoded together, with the prompt's length
        for message, held in zip(finished, self._held.leave([m.key for m in finished]), strict=True):
            if held is None:
                continue  # aborted, while this was on its way
            assert held.item is not None
            num_prompt = len(held.item.prompt_token_ids)
            if message.error is not None:
                results.append(_failed(message, num_prompt))
            elif held.item.want_progress:
                results.append(self._finish_watched(held, message))
            else:
                plain.append((message, num_prompt))
        texts = self._codec.decode([_spoken(message) for message, _ in plain])
        results += [
            Result(
                job=message.key.job,
                attempt=message.key.attempt,
                state=JobState.SUCCEEDED,
                text=text,
                token_ids=message.token_ids,
                logprobs=message.logprobs,
                finish_reason=message.finish_reason,
                prompt_tokens=num_prompt,
                details=_or_unset(message.details),
            )
            for (message, num_prompt), text in zip(plain, texts, strict=True)
        ]
        self._results.put(results)

    def _progress(self, message: Progress) -> None:
        held = self._held.in_engine(message.key)
        if held is None:
            return
        watch = self._watch(held)
        is_over = watch.feed(message.token_ids, message.logprobs, message.details)
        if is_over and self._held.leave([message.key]) == [held]:
            assert watch.match is not None
            self._feed.send(Abort((message.key,)))
            self._results.put([_stopped(held, watch, watch.match.text, FinishReason.STOP)])
            self._feed.offer()

    def _finish_watched(self, held: Held, message: Finished) -> Result:
        watch = self._watch(held)
        ends = message.finish_reason is FinishReason.STOP
        text = watch.finish(message.token_ids, message.logprobs, message.details, has_end_token=ends)
        reason = message.finish_reason if watch.match is None else FinishReason.STOP
        return _stopped(held, watch, text, reason)

    def _watch(self, held: Held) -> StopWatch:
        if held.stops is None:
            assert held.item is not None
            sampling = held.item.sampling
            held.stops = StopWatch(
                self._codec.tokenizer, sampling.stop, min_tokens=sampling.min_tokens, checkpoint=held.item.checkpoint
            )
        return held.stops

    def _release(self, released: list[Released]) -> None:
        left = self._held.leave([message.key for message in released])
        self._results.put_back(
            [
                Release(job=message.key.job, attempt=message.key.attempt, checkpoint=message.checkpoint)
                for message, held in zip(released, left, strict=True)
                if held is not None
            ]
        )


def _spoken(message: Finished) -> Sequence[int]:
    """The tokens that are text: an end token is not. The engine stops for nothing but an end token."""
    ids = message.token_ids
    return ids[:-1] if message.finish_reason is FinishReason.STOP else ids


def _failed(message: Finished, num_prompt: int) -> Result:
    return Result(
        job=message.key.job,
        attempt=message.key.attempt,
        state=JobState.FAILED,
        error=message.error,
        prompt_tokens=num_prompt,
    )


def _stopped(held: Held, watch: StopWatch, text: str, reason: FinishReason | None) -> Result:
    assert held.item is not None
    return Result(
        job=held.key.job,
        attempt=held.key.attempt,
        state=JobState.SUCCEEDED,
        text=text,
        token_ids=watch.token_ids,
        logprobs=watch.logprobs,
        finish_reason=reason,
        prompt_tokens=len(held.item.prompt_token_ids),
        details=_or_unset(watch.details),
    )


def _or_unset(details: Details | None) -> Details | msgspec.UnsetType:
    return msgspec.UNSET if details is None else details
