"""`Engine.generate`: many requests at once, answered in order, stop strings matched as text arrives."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from medley.spec.jobs import FinishReason
from medley_worker.engine.requests import Completion, Request, RequestOutput
from medley_worker.engine.sequences import Refused
from medley_worker.stops import StopMatch, StopMatcher

if TYPE_CHECKING:
    from medley_worker.engine.engine import Engine


def generate(engine: Engine, requests: list[Request]) -> list[Completion]:
    """See `Engine.generate`."""
    if engine.has_work:
        raise RuntimeError("generate() wants an engine without requests in flight; step() until they have ended")
    matchers = _matchers(engine, requests)
    for index, request in enumerate(requests):
        try:
            engine.add_request(index, request, stream=index in matchers)
        except Refused as refused:
            engine.abort(range(index))
            raise ValueError(f"requests[{index}].{refused}") from refused
    completions: dict[int, Completion] = {}
    while engine.has_work:
        for output in engine.step():
            index = output.request_id
            assert isinstance(index, int)
            completion = _complete(output, matchers.get(index))
            if completion is not None:
                completions[index] = completion
                if not output.is_finished:
                    engine.abort([index])
    return [completions[index] for index in range(len(requests))]


class _Matched:
    """One request's stop strings, and its tokens as far as they have been fed to the matcher."""

    def __init__(self, matcher: StopMatcher) -> None:
        self.matcher = matcher
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []

    def feed(self, output: RequestOutput) -> StopMatch | None:
        self.token_ids += output.new_token_ids
        self.logprobs += output.new_logprobs
        match = self.matcher.feed(output.new_token_ids)
        return self.matcher.finish() if match is None and output.is_finished else match


def _matchers(engine: Engine, requests: list[Request]) -> dict[int, _Matched]:
    indices = [i for i, request in enumerate(requests) if request.sampling.stop]
    if not indices:
        return {}
    path = Path(engine.config.model_dir) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"requests[{indices[0]}].sampling.stop: stop strings want {path}, which is not there")
    tokenizer = Tokenizer.from_file(str(path))
    return {
        i: _Matched(StopMatcher(tokenizer, sampling.stop, min_tokens=sampling.min_tokens))
        for i, sampling in ((i, requests[i].sampling) for i in indices)
    }


def _complete(output: RequestOutput, matched: _Matched | None) -> Completion | None:
    """The request's completion, or None while it goes on."""
    if matched is not None and output.error is None:
        match = matched.feed(output)
        if match is not None:
            kept = match.num_tokens
            return Completion(matched.token_ids[:kept], matched.logprobs[:kept], FinishReason.STOP, match.text)
    if not output.is_finished:
        return None
    text = matched.matcher.text if matched is not None else None
    return Completion(list(output.token_ids), list(output.logprobs), output.finish_reason, text, output.error)
