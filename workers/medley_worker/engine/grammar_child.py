"""The process that compiles a grammar first: `python -m medley_worker.engine.grammar_child MODEL_DIR VOCAB EOS...`.

A line of JSON comes in for each grammar, a line goes out: null, or why it is invalid. Time and memory are bounded by
the kernel, so a grammar that is beyond them ends this process and nothing else.
"""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

import msgspec

from medley.spec.grammars import Grammar
from medley_worker.engine.matchers import InvalidGrammar, NoTokenizer, compile_grammar, fill_masks, load_tokenizer
from medley_worker.parents import die_with_parent

CPU_S = 3.0  # of one grammar
MEMORY_BYTES = 1 << 30  # beyond what the tokenizer takes


def main() -> int:
    """Answer until stdin ends. Exit status 2: the model's tokenizer cannot serve."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the whole terminal group
    model_dir, vocab_size, *eos_token_ids = sys.argv[1:]
    try:
        tokenizer = load_tokenizer(Path(model_dir), int(vocab_size), [int(token) for token in eos_token_ids])
    except NoTokenizer as error:
        _say(str(error))
        return 2
    limit = _address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _say(None)
    for line in sys.stdin.buffer:
        grammar = msgspec.json.decode(line, type=Grammar)
        signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal ends the process
        try:
            fill_masks([compile_grammar(tokenizer, grammar)], int(vocab_size))
            verdict = None
        except InvalidGrammar as error:
            verdict = str(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(verdict)
    return 0


def _say(verdict: str | None) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    sys.stdout.buffer.flush()


def _address_space() -> int:
    """Bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(main())
