"""`Engine.generate`: many requests at once, answered in order, stop strings matched as text arrives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from medley.spec.jobs import FinishReason
from medley_worker.engine.requests import Completion, Request, RequestOutput
from medley_worker.engine.sequences import Refused
from medley_worker.stops import StopWatch

if TYPE_CHECKING:
    from medley_worker.engine.engine import Engine


def generate(engine: Engine, requests: list[Request]) -> list[Completion]:
    """See `Engine.generate`."""
    if engine.has_work:
        raise RuntimeError("generate() wants an engine without requests in flight; step() until they have ended")
    watches = _watches(engine, requests)
    completions: dict[int, Completion] = {}
    try:
        for index, request in enumerate(requests):
            try:
                engine.add_request(index, request, stream=index in watches)
            except Refused as refused:
                raise ValueError(f"requests[{index}].{refused}") from refused
        while engine.has_work:
            for output in engine.step():
                index = output.request_id
                assert isinstance(index, int)
                completion = _complete(output, watches.get(index))
                if completion is not None:
                    completions[index] = completion
                    if not output.is_finished:
                        engine.abort([index])
    finally:
        # After an error, or a Ctrl-C in a notebook, the engine is free for the next call.
        engine.abort(range(len(requests)))
    return [completions[index] for index in range(len(requests))]


def _watches(engine: Engine, requests: list[Request]) -> dict[int, StopWatch]:
    indices = [i for i, request in enumerate(requests) if request.sampling.stop]
    if not indices:
        return {}
    path = Path(engine.config.model_dir) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"requests[{indices[0]}].sampling.stop: stop strings want {path}, which is not there")
    tokenizer = Tokenizer.from_file(str(path))
    return {
        i: StopWatch(tokenizer, sampling.stop, min_tokens=sampling.min_tokens)
        for i, sampling in ((i, requests[i].sampling) for i in indices)
    }


def _complete(output: RequestOutput, watch: StopWatch | None) -> Completion | None:
    """The request's completion, or None while it goes on."""
    if watch is None or output.error is not None:
        if not output.is_finished:
            return None
        return Completion(
            list(output.token_ids),
            list(output.logprobs),
            output.finish_reason,
            error=output.error,
            details=output.details,
        )
    if output.is_finished:
        has_end_token = output.finish_reason is FinishReason.STOP
        text = watch.finish(output.token_ids, output.logprobs, output.details, has_end_token=has_end_token)
        reason = output.finish_reason if watch.match is None else FinishReason.STOP
        return Completion(watch.token_ids, watch.logprobs, reason, text, details=watch.details)
    watch.feed(output.new_token_ids, output.new_logprobs, output.details)
    if watch.match is None:
        return None
    return Completion(watch.token_ids, watch.logprobs, FinishReason.STOP, watch.match.text, details=watch.details)
