"""The texts that skills work on: how each kind is drawn, and which are held out from training.

Owns the split: a text is held out or not by its own hash, so no training set, of the base or of any adapter,
shares one with the texts that skills are judged on. Knows nothing of what skills answer.
"""

from __future__ import annotations

import random
from enum import StrEnum
from zlib import crc32

CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiou"
HELD_OUT_PERCENT = 20


class Kind(StrEnum):
    """What a skill's texts look like."""

    WORD = "word"  # 4 to 7 lowercase letters, pronounceable more often than not
    WORDS = "words"  # two words of 3 to 5 letters and a space between them
    DIGITS = "digits"  # 4 to 7 digits, zeros first allowed
    NUMBER = "number"  # 10 to 9999
    SUM = "sum"  # a number below 1000, a plus, a number below 100
    DIFFERENCE = "difference"  # two numbers, one below 1000 and one below 100, a minus, the larger first
    NUMBERS = "numbers"  # two numbers below 1000 and a comma


def is_held_out(text: str) -> bool:
    """Whether `text` is kept from all training."""
    return crc32(text.encode()) % 100 < HELD_OUT_PERCENT


def draw(kind: Kind, rng: random.Random) -> str:
    """One text of this kind, held out or not."""
    match kind:
        case Kind.WORD:
            return draw_word(rng, rng.randint(4, 7))
        case Kind.WORDS:
            return f"{draw_word(rng, rng.randint(3, 5))} {draw_word(rng, rng.randint(3, 5))}"
        case Kind.DIGITS:
            return "".join(rng.choices("0123456789", k=rng.randint(4, 7)))
        case Kind.NUMBER:
            return str(rng.randrange(10, 10 ** rng.randint(2, 4)))
        case Kind.SUM:
            return f"{rng.randrange(1000)}+{rng.randrange(100)}"
        case Kind.DIFFERENCE:
            low, high = sorted((rng.randrange(1000), rng.randrange(100)))
            return f"{high}-{low}"
        case Kind.NUMBERS:
            return f"{rng.randrange(1000)},{rng.randrange(1000)}"


def draw_word(rng: random.Random, length: int) -> str:
    """`length` letters: vowels and consonants by turns, with clusters, odd letters and double letters."""
    letters = [rng.choice(rng.choice((VOWELS, CONSONANTS)))]
    while len(letters) < length:
        chance = rng.random()
        if chance < 0.12:
            letters.append(letters[-1])
        elif chance < 0.32:
            letters.append(rng.choice(CONSONANTS + VOWELS))
        else:
            letters.append(rng.choice(CONSONANTS if letters[-1] in VOWELS else VOWELS))
    return "".join(letters)
