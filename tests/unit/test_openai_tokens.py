"""Tokens as texts: each by itself, whole characters as text and parts of one by their bytes, whatever the decoder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from medley.api.openai.tokens import TokenTexts

MODEL = Path(__file__).parents[2] / "app/medley/demo/assets/model"


def texts_of(folder: Path, vocabulary: list[str], decoder: decoders.Decoder) -> TokenTexts:
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], byte_fallback=True))
    tokenizer.decoder = decoder
    tokenizer.save(str(folder / "tokenizer.json"))
    return TokenTexts(folder)


def test_bytes_that_are_no_character_are_shown_as_bytes() -> None:
    texts = TokenTexts(MODEL)
    assert texts.texts([104, 195, 169, 256, 0]) == [
        ("h", [104]),
        ("bytes:\\xc3", [195]),
        ("bytes:\\xa9", [169]),
        ("<s>", [60, 115, 62]),
        ("\0", [0]),
    ]
    assert [token.num_chars for token in texts.texts([104, 195, 169, 256])] == [1, 1, 0, 3]
    assert texts.joined([256, 104, 195, 169]) == "<s>h\u00e9"


def test_a_blank_before_a_word_is_kept_wherever_the_token_stands(tmp_path: Path) -> None:
    decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    texts = texts_of(tmp_path, ["a", "\u2581hello", "<0xE2>", "<0x96>", "!"], decoder)
    assert [token.text for token in texts.texts([1, 4, 2, 1])] == [" hello", "!", "bytes:\\xe2", " hello"]
    assert texts.texts([3])[0].bytes == [0x96]
