"""Tries grammars in a process of their own before this one compiles them, so that none can stall or end it.

Owns that process: started when it is first needed, started again after a grammar was too much for it.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from medley.spec.grammars import Grammar
from medley_worker.engine.grammar_child import CPU_S, MEMORY_BYTES
from medley_worker.engine.matchers import InvalidGrammar, NoTokenizer

START_S = 120.0  # for a large tokenizer on a busy machine
ANSWER_S = 30.0  # wall time: the child's own limit is of computing time


class GrammarTrials:
    """Used by one thread: the child dies with the thread that started it."""

    def __init__(self, model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._arguments = [str(model_dir), str(vocab_size), *map(str, eos_token_ids)]
        self._child: subprocess.Popen[bytes] | None = None

    def run(self, grammar: Grammar) -> None:
        """Return where the grammar compiles within the limits. Raises InvalidGrammar, or NoTokenizer."""
        if self._child is not None and self._child.poll() is not None:
            self.close()  # whatever ended it, it was no grammar
        child = self._child or self._start()
        assert child.stdin is not None
        try:
            child.stdin.write(msgspec.json.encode(grammar) + b"\n")
            child.stdin.flush()
            verdict = _read(child, ANSWER_S)
        except (OSError, EOFError, TimeoutError):
            self.close()
            message = f"{grammar.kind}: compiling it fails, or takes more than {CPU_S:g} s or {MEMORY_BYTES >> 20} MiB"
            raise InvalidGrammar(message) from None
        if verdict is not None:
            raise InvalidGrammar(verdict)

    def close(self) -> None:
        """End the child; another is started when one is needed."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "medley_worker.engine.grammar_child", *self._arguments]
        self._child = child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            fault = _read(child, START_S)
        except (EOFError, TimeoutError) as error:
            fault = f"the process that tries grammars does not start: {type(error).__name__}"
        if fault is not None:
            self.close()
            raise NoTokenizer(fault)
        return child


def _read(child: subprocess.Popen[bytes], timeout_s: float) -> str | None:
    """The child's next line. Raises EOFError, TimeoutError."""
    assert child.stdout is not None
    # Lines are short and come one at a time, so what is buffered is never more than one.
    if not select.select([child.stdout], [], [], timeout_s)[0]:
        raise TimeoutError
    line = os.read(child.stdout.fileno(), 1 << 16)
    while line and not line.endswith(b"\n"):
        more = os.read(child.stdout.fileno(), 1 << 16)
        line = line + more if more else b""
    if not line:
        raise EOFError
    verdict: str | None = msgspec.json.decode(line, type=str | None)
    return verdict
