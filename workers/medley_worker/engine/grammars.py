"""Grammars on their way to matchers: compiled on a thread of their own, kept while there is room, keyed by content.

Owns the requests that wait for their matcher. A grammar that cannot be compiled fails those that brought it and is
remembered as well, so that a thousand jobs with one bad schema cost one trial.
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medley.spec.errors import ErrorCode, JobError
from medley.spec.grammars import Grammar
from medley_worker.engine.grammar_trials import GrammarTrials
from medley_worker.engine.matchers import InvalidGrammar, NoTokenizer, compile_grammar, copy_at, load_tokenizer
from medley_worker.engine.sequences import RequestId, Sequence

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KEPT = 128  # compiled grammars, and refusals


@dataclass(slots=True)
class _Waiting:
    sequence: Sequence
    grammar: Grammar


class Grammars:
    """Requests with a grammar wait here before the scheduler has them. One thread compiles; the others ask."""

    def __init__(self, model_dir: Path, vocab_size: int, eos_token_ids: Seq[int]) -> None:
        self._arguments = (model_dir, vocab_size, eos_token_ids)
        self._waiting: dict[RequestId, _Waiting] = {}
        self._asked: queue.SimpleQueue[Grammar | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._compiled: OrderedDict[Grammar, LLMatcher | JobError] = OrderedDict()  # least used first
        self._compiling: set[Grammar] = set()
        self._thread: threading.Thread | None = None
        self._tokenizer: LLTokenizer | NoTokenizer | None = None

    def prepare(self) -> None:
        """Load the tokenizer now. Later it would hold up every thread: llguidance keeps the interpreter meanwhile."""
        try:
            self._tokenizer = load_tokenizer(*self._arguments)
        except NoTokenizer as error:
            self._tokenizer = error

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def holds(self, sequence: Sequence) -> bool:
        return sequence.request_id in self._waiting

    def add(self, sequence: Sequence, grammar: Grammar) -> None:
        """Have `sequence` wait until `take` gives it back."""
        self._waiting[sequence.request_id] = _Waiting(sequence, grammar)
        with self._changed:
            self._ask(grammar)

    def remove(self, sequence: Sequence) -> None:
        del self._waiting[sequence.request_id]

    def take(self) -> tuple[list[Sequence], list[tuple[Sequence, JobError]]]:
        """(requests that have their matcher now, requests that cannot have one), in the order in which they came."""
        ready: list[Sequence] = []
        failed: list[tuple[Sequence, JobError]] = []
        for waiting in list(self._waiting.values()):
            with self._changed:
                compiled = self._compiled.get(waiting.grammar)
                if compiled is None:
                    self._ask(waiting.grammar)  # again, where others have displaced it meanwhile
                    continue
                self._compiled.move_to_end(waiting.grammar)
            sequence = waiting.sequence
            del self._waiting[sequence.request_id]
            if isinstance(compiled, JobError):
                failed.append((sequence, compiled))
                continue
            try:
                sequence.matcher = copy_at(compiled, sequence.output_ids.tolist())
                ready.append(sequence)
            except InvalidGrammar as error:
                failed.append((sequence, _invalid(error)))
        return ready, failed

    def wait(self, timeout_s: float) -> None:
        """Until something that is waited for has been compiled."""
        wanted = {waiting.grammar for waiting in self._waiting.values()}
        with self._changed:
            self._changed.wait_for(lambda: not wanted.isdisjoint(self._compiled), timeout_s)

    def close(self) -> None:
        """End the thread and its child; what waits is dropped."""
        self._waiting.clear()
        if self._thread is not None:
            self._asked.put(None)
            self._thread = None

    def _ask(self, grammar: Grammar) -> None:
        if grammar in self._compiled or grammar in self._compiling:
            return
        self._compiling.add(grammar)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="grammars", daemon=True)
            self._thread.start()
        self._asked.put(grammar)

    def _run(self) -> None:
        trials = GrammarTrials(*self._arguments)
        while (grammar := self._asked.get()) is not None:
            compiled: LLMatcher | JobError
            try:
                if self._tokenizer is None:
                    self.prepare()
                if isinstance(self._tokenizer, NoTokenizer):
                    raise self._tokenizer
                assert self._tokenizer is not None
                trials.run(grammar)
                compiled = compile_grammar(self._tokenizer, grammar)
            except InvalidGrammar as error:
                compiled = _invalid(error)
            except (NoTokenizer, OSError) as error:
                compiled = JobError(code=ErrorCode.ENGINE, message=str(error))
            except BaseException as error:  # a panic of the Rust binding is no Exception; unanswered, jobs would wait
                compiled = JobError(
                    code=ErrorCode.INVALID_GRAMMAR,
                    message=f"{grammar.kind}: it cannot be compiled: {type(error).__name__}",
                )
            with self._changed:
                self._compiled[grammar] = compiled
                while len(self._compiled) > MAX_KEPT:
                    self._compiled.popitem(last=False)
                self._compiling.discard(grammar)
                self._changed.notify_all()
        trials.close()


def _invalid(error: InvalidGrammar) -> JobError:
    return JobError(code=ErrorCode.INVALID_GRAMMAR, message=str(error))
