"""Stop strings against a real byte-level tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from medley_worker.stops import IncrementalText, StopMatch, StopMatcher, StopWatch


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    vocab["lo"], vocab["Ġwor"] = len(vocab), len(vocab) + 1
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], fuse_unk=False))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text).ids)


@pytest.mark.parametrize("text", ["hello world", "naïve 日本語 🙂 done", "a🙂🙂b"])
def test_pieces_join_to_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    stream = IncrementalText(tokenizer)
    pieces = [stream.append(i) for i in ids(tokenizer, text)]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_are_no_text_are_not_held_back_for_ever(tokenizer: Tokenizer) -> None:
    stream = IncrementalText(tokenizer)
    cut = ids(tokenizer, "🙂")[0]
    assert "".join(stream.append(cut) for _ in range(12)).count("\ufffd") >= 8


def test_characters_among_broken_bytes_are_not_lost(tokenizer: Tokenizer) -> None:
    byte_ids = {symbol: i for symbol, i in tokenizer.get_vocab().items() if len(symbol) == 1}
    parts = [ids(tokenizer, text) for text in ("a", " x", "é", "日", "🙂")] + [[i] for i in byte_ids.values()]
    rng = random.Random(3)
    for _ in range(100):
        tokens = [i for _ in range(30) for i in rng.choice(parts[: rng.choice([5, len(parts)])])]
        stream = IncrementalText(tokenizer)
        assert "".join(map(stream.append, tokens)) + stream.finish() == tokenizer.decode(tokens)


def test_characters_of_several_byte_tokens_join_under_byte_fallback() -> None:
    """Llama 2's way, where a byte too few breaks the whole run of byte tokens that it ends."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"\u2581a": 256, "b": 257}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    rng = random.Random(4)
    for _ in range(100):
        tokens = [i for _ in range(12) for i in rng.choice([[256], [257], *map(list, map(str.encode, "é日🙂"))])]
        stream = IncrementalText(made)
        assert "".join(map(stream.append, tokens)) + stream.finish() == made.decode(tokens)


def test_a_stop_string_counts_at_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    cut = ids(tokenizer, "🙂")[:2]
    assert StopMatcher(tokenizer, ["b"]).feed([*ids(tokenizer, "ab"), *cut, *cut]) == StopMatch("a", 2)


def test_the_output_is_cut_before_the_earliest_stop_string(tokenizer: Tokenizer) -> None:
    matcher = StopMatcher(tokenizer, ["world", "o w"])
    assert matcher.feed(ids(tokenizer, "hello world")) == StopMatch("hell", 7)


def test_a_stop_string_may_be_spread_over_tokens_and_feeds(tokenizer: Tokenizer) -> None:
    tokens = ids(tokenizer, "one END two")
    whole = StopMatcher(tokenizer, ["END"]).feed(tokens)
    rng = random.Random(0)
    for _ in range(20):
        matcher = StopMatcher(tokenizer, ["END"])
        at, match = 0, None
        while match is None:
            size = rng.randint(1, 4)
            match = matcher.feed(tokens[at : at + size])
            at += size
        assert match == whole == StopMatch("one ", 7)


def test_a_stop_string_within_min_tokens_does_not_count(tokenizer: Tokenizer) -> None:
    matcher = StopMatcher(tokenizer, ["a"], min_tokens=3)
    assert matcher.feed(ids(tokenizer, "aabcab")) == StopMatch("aabc", 5)


def test_text_without_a_match_is_whole_after_finish(tokenizer: Tokenizer) -> None:
    matcher = StopMatcher(tokenizer, ["zz"])
    tokens = ids(tokenizer, "ab🙂")[:-1]
    assert matcher.feed(tokens) is None
    assert matcher.text == "ab"
    assert matcher.finish() is None
    assert matcher.text == "ab\ufffd"
    assert matcher.num_tokens == len(tokens)


def test_tokens_without_text_are_not_decoded_again_and_again() -> None:
    vocab = {"a": 0, "<end>": 1, " b": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<end>"])
    longest = 0

    class Counting:
        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    stream = IncrementalText(Counting())
    assert "".join(stream.append(i) for i in [0, *[1] * 1000, 2, 0]) + stream.finish() == "a ba"
    assert longest < 32


def test_an_end_token_is_no_part_of_the_watched_text(tokenizer: Tokenizer) -> None:
    watch = StopWatch(tokenizer, ["END", "!"])
    tokens = ids(tokenizer, "hello!")
    assert watch.finish(tokens, [-1.0] * 6, has_end_token=True) == "hello"
    assert (watch.match, watch.token_ids, len(watch.logprobs)) == (None, tokens, 6)
