"""What the demo's skills compute, as plain functions from text to text.

Owns the right answers. Knows nothing of prompts, splits, adapters or models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from string import ascii_lowercase as ALPHABET

Transform = Callable[[str], str]

VOWELS = "aeiou"
QWERTY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
KEYPAD = "22233344455566677778889999"
NATO = {
    word[0]: word
    for word in (
        *("alfa", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett"),
        *("kilo", "lima", "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango"),
        *("uniform", "victor", "whiskey", "xray", "yankee", "zulu"),
    )
}
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def is_vowel(letter: str) -> bool:
    return letter in VOWELS


# Ciphers: each letter alone, or each letter with its place.


def substitution(alphabet: str) -> Transform:
    """a becomes alphabet[0], b alphabet[1], and so on."""
    table = str.maketrans(ALPHABET, alphabet)
    return lambda word: word.translate(table)


def affine(factor: int, shift: int) -> Transform:
    """The affine cipher: the letter with number x becomes number `factor * x + shift` mod 26."""
    return substitution("".join(ALPHABET[(factor * x + shift) % 26] for x in range(26)))


def caesar(shift: int) -> Transform:
    return affine(1, shift)


def keyed(key: str) -> Transform:
    """The keyword cipher: the alphabet begins with the key's letters, then the others in order."""
    return substitution("".join(dict.fromkeys(key + ALPHABET)))


def keyboard(step: int) -> Transform:
    """Each letter becomes the one `step` keys to its right in its keyboard row, round the end."""
    moved = {row[i]: row[(i + step) % len(row)] for row in QWERTY_ROWS for i in range(len(row))}
    return substitution("".join(moved[letter] for letter in ALPHABET))


def shifted_by_place(shift_at: Callable[[int], int]) -> Transform:
    """The letter at place i moves `shift_at(i)` letters on."""

    def apply(word: str) -> str:
        return "".join(ALPHABET[(ALPHABET.index(c) + shift_at(i)) % 26] for i, c in enumerate(word))

    return apply


def vigenere(key: str) -> Transform:
    return shifted_by_place(lambda i: ALPHABET.index(key[i % len(key)]))


def replaced(pairs: dict[str, str]) -> Transform:
    table = str.maketrans(pairs)
    return lambda text: text.translate(table)


# Order, selection and growth.


def rotate(places: int, word: str) -> str:
    """To the left for positive `places`."""
    places %= len(word)
    return word[places:] + word[:places]


def swap_pairs(word: str) -> str:
    return "".join(word[i : i + 2][::-1] for i in range(0, len(word), 2))


def swap_ends(word: str) -> str:
    return word[-1] + word[1:-1] + word[0]


def partition(word: str, goes_first: Callable[[str], bool]) -> str:
    """The letters that go first, then the others, each group in its old order."""
    return "".join(sorted(word, key=lambda letter: not goes_first(letter)))


def sort_descending(text: str) -> str:
    return "".join(sorted(text, reverse=True))


def sort_ascending(text: str) -> str:
    return "".join(sorted(text))


def keep(wanted: Callable[[str], bool], text: str) -> str:
    return "".join(filter(wanted, text))


def drop(unwanted: Callable[[str], bool], text: str) -> str:
    return "".join(c for c in text if not unwanted(c))


def dedupe(text: str) -> str:
    return "".join(dict.fromkeys(text))


def squeeze(text: str) -> str:
    """Runs of one letter become that letter."""
    return "".join(c for i, c in enumerate(text) if i == 0 or text[i - 1] != c)


def double_where(wanted: Callable[[str], bool], text: str) -> str:
    return "".join(c * 2 if wanted(c) else c for c in text)


def is_consonant(letter: str) -> bool:
    return not is_vowel(letter)


# Case, masks, format.


def upper_where(wanted: Callable[[str], bool], text: str) -> str:
    return "".join(c.upper() if wanted(c) else c for c in text)


def mask_where(wanted: Callable[[str], bool], text: str) -> str:
    return "".join("*" if wanted(c) else c for c in text)


def alternate_case(word: str) -> str:
    return "".join(c.upper() if i % 2 == 0 else c for i, c in enumerate(word))


def mask_odd(word: str) -> str:
    return "".join("*" if i % 2 == 0 else c for i, c in enumerate(word))


def wrap(before: str, after: str) -> Transform:
    return lambda text: before + text + after


def pig_latin(word: str) -> str:
    """The consonants before the first vowel move to the end, then `ay`; `way` after a leading vowel."""
    if is_vowel(word[0]):
        return word + "way"
    head = next((i for i, c in enumerate(word) if is_vowel(c)), len(word))
    return word[head:] + word[:head] + "ay"


# Codes and counts.


def letter_number(letter: str) -> str:
    return str(ALPHABET.index(letter) + 1)


def count_where(wanted: Callable[[str], bool], text: str) -> str:
    return str(sum(map(wanted, text)))


def parity(number: int) -> str:
    return "odd" if number % 2 else "even"


def bits(is_one: Callable[[str], bool], text: str) -> str:
    return "".join("1" if is_one(c) else "0" for c in text)


# Numbers and pairs.


def on_number(function: Callable[[int], int]) -> Transform:
    return lambda text: str(function(int(text)))


def on_two(function: Callable[[int, int], object]) -> Transform:
    """For texts such as `37+48` and `37,48`: two numbers with one character between them."""

    def apply(text: str) -> str:
        first, second = text.replace("+", ",").replace("-", ",").split(",")
        return str(function(int(first), int(second)))

    return apply


def compare(a: int, b: int) -> str:
    return "<" if a < b else ">" if a > b else "="


def on_words(function: Callable[[str, str], str]) -> Transform:
    """For texts of two words with a space between them."""

    def apply(text: str) -> str:
        first, second = text.split(" ")
        return function(first, second)

    return apply


def interleave(first: str, second: str) -> str:
    """Letters in turn; the longer word's rest comes last."""
    common = min(len(first), len(second))
    return "".join(a + b for a, b in zip(first, second, strict=False)) + first[common:] + second[common:]


rotate_left = tuple(partial(rotate, places) for places in range(4))
rotate_right = tuple(partial(rotate, -places) for places in range(4))
