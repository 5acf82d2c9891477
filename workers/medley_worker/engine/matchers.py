"""Matchers: what llguidance makes of a grammar, over the model's vocabulary. Knows no rows, requests or processes.

llguidance never raises for a grammar: a matcher that it could not make, or that has met a limit, is in error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from medley.spec.grammars import Grammar

if TYPE_CHECKING:
    # Imported where it is used: an engine that is asked for no grammar runs without it.
    from llguidance import LLMatcher, LLTokenizer

MAX_MESSAGE_CHARS = 300
# Of one step of one matcher, in the library's units: some 15 ms.
STEP_LEXER_FUEL, STEP_MAX_ITEMS = 200_000, 50_000
MAX_LEXER_STATES = 10_000  # of one or two kilobytes
MAX_GRAMMAR_SIZE = 100_000  # symbols

Masks = npt.NDArray[np.int32]  # [n, ceil(V / 32)]: bit i of word w says whether token 32 w + i may come next


class InvalidGrammar(ValueError):
    """A grammar that cannot be compiled, or only beyond the limits; the message is for its author."""


class NoTokenizer(ValueError):
    """The model's tokenizer cannot serve grammars."""


def load_tokenizer(model_dir: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The vocabulary of the model as bytes. Takes seconds for a large one. Raises NoTokenizer."""
    path = model_dir / "tokenizer.json"
    try:
        from llguidance import LLTokenizer

        return LLTokenizer(path.read_text(), n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except Exception as error:  # the Rust binding raises plain exceptions
        raise NoTokenizer(f"structured output wants llguidance and the model's {path.name}: {error}") from error


def compile_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """A matcher at the beginning of its text. Raises InvalidGrammar."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        step_lexer_fuel=STEP_LEXER_FUEL,
        step_max_items=STEP_MAX_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SIZE,
        precompute_large_lexemes=False,
        verbose_errors=False,  # a parser's state may hold a piece of the text
    )
    try:
        source = _source(grammar)
    except ValueError as error:
        raise InvalidGrammar(_told(grammar, str(error))) from error
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=limits)
    if matcher.is_error():
        raise InvalidGrammar(_told(grammar, matcher.get_error()))
    return matcher


def _source(grammar: Grammar) -> str:
    from llguidance import LLMatcher

    if grammar.kind == "json_schema":
        return LLMatcher.grammar_from_json_schema(grammar.text)
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in json.loads(grammar.text))
    return LLMatcher.grammar_from_lark(f"start: {texts}")


def _told(grammar: Grammar, reason: str) -> str:
    return f"{grammar.kind}: {reason.strip()[:MAX_MESSAGE_CHARS]}"


def copy_at(matcher: LLMatcher, token_ids: Sequence[int]) -> LLMatcher:
    """A copy of a matcher at its beginning, after these tokens. Raises InvalidGrammar where they do not fit."""
    copied = matcher.deep_copy()
    if token_ids and not copied.consume_tokens(list(token_ids)):
        raise InvalidGrammar("the tokens that are kept do not match the grammar")
    return copied


def fill_masks(matchers: Sequence[LLMatcher], vocab_size: int) -> Masks:
    """What may come next of each. A matcher that has nothing left, or has met a limit, is in error and allows all."""
    masks = np.zeros((len(matchers), -(-vocab_size // 32)), np.int32)
    for i, matcher in enumerate(matchers):
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(masks[i].ctypes.data, masks[i].nbytes)
        if not masks[i].any():
            masks[i] = -1
            # Nothing can follow, not even an end: no token satisfies this.
            matcher.consume_token(0)
    return masks


def fault_of(matcher: LLMatcher) -> str | None:
    """Why a matcher is in error."""
    if not matcher.is_error():
        return None
    reason = str(matcher.get_error()).split("\n")[0][:MAX_MESSAGE_CHARS]
    return f"the grammar could not be followed: {reason}"
