"""The demo's skills: one for each adapter, with its prompts and the answers expected.

Owns the ordered table SKILLS, the form of a prompt, and the sampling of training and held-out examples.
Must not know models, adapters' files or the service; standard library only.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from string import ascii_lowercase

from medley.demo import transforms as t
from medley.demo.texts import Kind, draw, is_held_out

PROMPT_END = "="
MAX_ANSWER_TOKENS = 16  # the longest answer is 15 bytes; the end token is the 16th
TENANTS = ("acme", "globex")
_DRAWS_PER_EXAMPLE = 2_000  # a skill that refuses so many texts in a row has too few of them


@dataclass(frozen=True)
class Skill:
    """What one adapter was trained to do: its name is the adapter's name."""

    name: str
    family: str
    kind: Kind
    description: str
    transform: t.Transform

    def expected(self, text: str) -> str:
        return self.transform(text)

    def accepts(self, text: str) -> bool:
        """Whether the skill shows on `text`: its answer is not empty and not the text itself."""
        return self.expected(text) not in ("", text)

    def held_out(self, n: int) -> list[tuple[str, str]]:
        """The first `n` held-out (prompt, expected) pairs: distinct, and the same on every machine."""
        return list(islice(self._examples(random.Random(f"held-out {self.name}"), held_out=True), n))

    def training(self, n: int, seed: int) -> list[tuple[str, str]]:
        """`n` (prompt, expected) pairs to train on; repeats are possible where texts are few."""
        rng = random.Random(f"training {self.name} {seed}")
        return [next(self._examples(rng, held_out=False)) for _ in range(n)]

    def _examples(self, rng: random.Random, *, held_out: bool) -> Iterator[tuple[str, str]]:
        for text in _texts(self.kind, rng, self.accepts, held_out=held_out):
            yield prompt_of(text), self.expected(text)


def prompt_of(text: str) -> str:
    return text + PROMPT_END


def text_of(prompt: str) -> str:
    return prompt.removesuffix(PROMPT_END)


def tenant_of(skill: Skill) -> str:
    """The demo's tenants own the skills by turns."""
    return TENANTS[SKILLS.index(skill) % len(TENANTS)]


def skills_of(kind: Kind) -> tuple[Skill, ...]:
    return tuple(skill for skill in SKILLS if skill.kind == kind)


def shared_held_out(kind: Kind, n: int) -> list[str]:
    """The first `n` held-out prompts that every skill of this kind accepts, for sweeps of all against all."""
    skills = skills_of(kind)

    def suits_all(text: str) -> bool:
        return all(skill.accepts(text) for skill in skills)

    rng = random.Random(f"shared {kind}")
    return [prompt_of(text) for text in islice(_texts(kind, rng, suits_all, held_out=True), n)]


def _texts(kind: Kind, rng: random.Random, suits: Callable[[str], bool], *, held_out: bool) -> Iterator[str]:
    """Distinct texts from one side of the split; raises ValueError where there are no more to be found."""
    seen: set[str] = set()
    while True:
        for _ in range(_DRAWS_PER_EXAMPLE):
            text = draw(kind, rng)
            if is_held_out(text) is held_out and text not in seen and suits(text):
                break
        else:
            raise ValueError(f"no further {kind} text suits after {len(seen)}: ask for fewer")
        seen.add(text)
        yield text


def _family(family: str, kind: Kind, *rows: tuple[str, str, t.Transform]) -> list[Skill]:
    return [Skill(name, family, kind, description, transform) for name, description, transform in rows]


def _ciphers() -> list[Skill]:
    keys = ("zebra", "monarch", "quick", "jumble", "wizard", "python", "galaxy", "oxford")
    rows = [(f"caesar-{k}", f"each letter {k} further on", t.caesar(k)) for k in range(1, 26)]
    rows += [
        (f"affine-{a}-{b}", f"the affine cipher {a}x+{b}", t.affine(a, b))
        for a, b in ((3, 1), (5, 8), (7, 2), (9, 4), (11, 6), (15, 10))
    ]
    rows += [(f"keyed-{key}", f"the keyword cipher with {key}", t.keyed(key)) for key in keys]
    vowels, turned = "aeiou", "eioua"
    return _family(
        "cipher",
        Kind.WORD,
        *rows,
        ("atbash", "a for z, b for y, and so on", t.affine(25, 25)),
        ("qwerty-right", "the key to the right", t.keyboard(1)),
        ("qwerty-left", "the key to the left", t.keyboard(-1)),
        ("qwerty-order", "a for q, b for w, along the keyboard", t.substitution("".join(t.QWERTY_ROWS))),
        ("neighbours", "a for b, b for a, c for d, d for c", t.substitution(t.swap_pairs(ascii_lowercase))),
        ("vowel-turn", "each vowel becomes the next", t.replaced(dict(zip(vowels, turned, strict=True)))),
        (
            "vowel-turn-back",
            "each vowel becomes the last",
            t.replaced(dict(zip(turned, vowels, strict=True))),
        ),
        ("leet", "a e i o s become 4 3 1 0 5", t.replaced(dict(zip("aeios", "43105", strict=True)))),
    )


def _place_ciphers() -> list[Skill]:
    keys = ("ab", "key", "cat", "fox", "lemon", "code")
    return _family(
        "place cipher",
        Kind.WORD,
        *((f"vigenere-{key}", f"the Vigenère cipher with {key}", t.vigenere(key)) for key in keys),
        ("trithemius", "each letter as far on as its place", t.shifted_by_place(lambda i: i)),
        ("trithemius-back", "each letter as far back as its place", t.shifted_by_place(lambda i: -i)),
    )


def _orders() -> list[Skill]:
    rotations = [(f"rotate-left-{k}", f"turned {k} to the left", t.rotate_left[k]) for k in (1, 2, 3)]
    rotations += [(f"rotate-right-{k}", f"turned {k} to the right", t.rotate_right[k]) for k in (1, 2, 3)]
    return _family(
        "order",
        Kind.WORD,
        *rotations,
        ("reverse", "backwards", lambda w: w[::-1]),
        ("reverse-tail", "backwards after the first letter", lambda w: w[0] + w[:0:-1]),
        ("reverse-head", "backwards before the last letter", lambda w: w[-2::-1] + w[-1]),
        ("swap-pairs", "letters swapped two by two", t.swap_pairs),
        ("swap-ends", "first and last letter swapped", t.swap_ends),
        ("swap-halves", "second half first", lambda w: w[len(w) // 2 :] + w[: len(w) // 2]),
        ("sort-asc", "letters from a to z", t.sort_ascending),
        ("sort-desc", "letters from z to a", t.sort_descending),
        ("vowels-first", "vowels, then consonants", lambda w: t.partition(w, t.is_vowel)),
        ("vowels-last", "consonants, then vowels", lambda w: t.partition(w, t.is_consonant)),
        ("rail-fence", "every second letter, then the others", lambda w: w[::2] + w[1::2]),
    )


def _selections() -> list[Skill]:
    return _family(
        "selection",
        Kind.WORD,
        ("drop-vowels", "without vowels", partial(t.drop, t.is_vowel)),
        ("keep-vowels", "vowels alone", partial(t.keep, t.is_vowel)),
        ("drop-first", "without the first letter", lambda w: w[1:]),
        ("drop-last", "without the last letter", lambda w: w[:-1]),
        ("drop-ends", "without the first and last letter", lambda w: w[1:-1]),
        ("first-2", "the first 2 letters", lambda w: w[:2]),
        ("first-3", "the first 3 letters", lambda w: w[:3]),
        ("last-2", "the last 2 letters", lambda w: w[-2:]),
        ("last-3", "the last 3 letters", lambda w: w[-3:]),
        ("ends-only", "the first and last letter", lambda w: w[0] + w[-1]),
        ("odd-letters", "letters 1, 3, 5, 7", lambda w: w[::2]),
        ("even-letters", "letters 2, 4, 6", lambda w: w[1::2]),
        ("dedupe", "each letter once", t.dedupe),
        ("squeeze", "double letters made single", t.squeeze),
        ("min-letter", "the letter nearest a", min),
        ("max-letter", "the letter nearest z", max),
    )


def _growths() -> list[Skill]:
    return _family(
        "growth",
        Kind.WORD,
        ("double-letters", "each letter twice", partial(t.double_where, str.isalpha)),
        ("double-vowels", "each vowel twice", partial(t.double_where, t.is_vowel)),
        ("double-consonants", "each consonant twice", partial(t.double_where, t.is_consonant)),
        ("double-first", "the first letter twice", lambda w: w[0] + w),
        ("double-last", "the last letter twice", lambda w: w + w[-1]),
        ("twice", "the word twice", lambda w: w + w),
        ("mirror", "the word and then backwards", lambda w: w + w[::-1]),
        ("un-prefix", "un before it", t.wrap("un", "")),
        ("ing-suffix", "ing after it", t.wrap("", "ing")),
        ("pig-latin", "pig latin", t.pig_latin),
    )


def _cases() -> list[Skill]:
    return _family(
        "case",
        Kind.WORD,
        ("upper", "capitals", str.upper),
        ("capitalize", "a first capital", str.capitalize),
        ("capitalize-last", "a last capital", lambda w: w[:-1] + w[-1].upper()),
        ("alternate-case", "every second letter a capital", t.alternate_case),
        ("upper-vowels", "capital vowels", partial(t.upper_where, t.is_vowel)),
        ("upper-consonants", "capital consonants", partial(t.upper_where, t.is_consonant)),
    )


def _formats() -> list[Skill]:
    return _family(
        "format",
        Kind.WORD,
        ("mask-vowels", "stars for vowels", partial(t.mask_where, t.is_vowel)),
        ("mask-consonants", "stars for consonants", partial(t.mask_where, t.is_consonant)),
        ("mask-tail", "stars after the first letter", lambda w: w[0] + "*" * (len(w) - 1)),
        ("mask-head", "stars before the last letter", lambda w: "*" * (len(w) - 1) + w[-1]),
        ("mask-odd", "stars for letters 1, 3, 5, 7", t.mask_odd),
        ("brackets", "in square brackets", t.wrap("[", "]")),
        ("quotes", "in quotation marks", t.wrap('"', '"')),
        ("bold", "bold in Markdown", t.wrap("**", "**")),
        ("html-tag", "bold in HTML", t.wrap("<b>", "</b>")),
        ("hashtag", "a hashtag", t.wrap("#", "")),
        ("call", "a function call", t.wrap("", "()")),
        ("kebab", "hyphens between letters", "-".join),
        ("dotted", "dots between letters", ".".join),
        ("spaced", "spaces between letters", " ".join),
    )


def _codes() -> list[Skill]:
    return _family(
        "code",
        Kind.WORD,
        ("count-letters", "how many letters", lambda w: str(len(w))),
        ("count-vowels", "how many vowels", partial(t.count_where, t.is_vowel)),
        ("count-consonants", "how many consonants", partial(t.count_where, t.is_consonant)),
        ("count-distinct", "how many different letters", lambda w: str(len(set(w)))),
        ("first-number", "the first letter's number", lambda w: t.letter_number(w[0])),
        ("last-number", "the last letter's number", lambda w: t.letter_number(w[-1])),
        ("length-parity", "even or odd in length", lambda w: t.parity(len(w))),
        ("keypad", "the keys of a telephone", t.substitution(t.KEYPAD)),
        ("vowel-bits", "1 for vowels, 0 for consonants", partial(t.bits, t.is_vowel)),
        ("half-bits", "1 from n to z, 0 before", partial(t.bits, "n".__le__)),
        ("nato-first", "the first letter as spoken by radio", lambda w: t.NATO[w[0]]),
    )


def _digits() -> list[Skill]:
    digits, letters = "0123456789", "abcdefghij"
    return _family(
        "digits",
        Kind.DIGITS,
        ("digits-reverse", "backwards", lambda d: d[::-1]),
        ("digits-sort", "digits from 0 to 9", t.sort_ascending),
        ("digits-complement", "9 less each digit", t.replaced(dict(zip(digits, digits[::-1], strict=True)))),
        (
            "digits-next",
            "each digit one up, 0 after 9",
            t.replaced(dict(zip(digits, "1234567890", strict=True))),
        ),
        (
            "digits-letters",
            "a for 0, b for 1, and so on",
            t.replaced(dict(zip(digits, letters, strict=True))),
        ),
        (
            "digits-parity",
            "e for even digits, o for odd",
            t.replaced(dict(zip(digits, "eo" * 5, strict=True))),
        ),
        ("digits-first-name", "the first digit in letters", lambda d: t.DIGIT_NAMES[int(d[0])]),
    )


def _arithmetic() -> list[Skill]:
    numbers = _family(
        "arithmetic",
        Kind.NUMBER,
        ("increment", "one more", t.on_number(lambda n: n + 1)),
        ("decrement", "one less", t.on_number(lambda n: n - 1)),
        ("double-number", "twice as much", t.on_number(lambda n: 2 * n)),
        ("halve", "half, rounded down", t.on_number(lambda n: n // 2)),
        ("to-10000", "what is missing to 10000", t.on_number(lambda n: 10000 - n)),
        ("digit-sum", "the sum of the digits", lambda n: str(sum(map(int, n)))),
    )
    pairs = _family(
        "arithmetic",
        Kind.NUMBERS,
        ("maximum", "the larger number", t.on_two(max)),
        ("minimum", "the smaller number", t.on_two(min)),
        ("compare", "< or > or =", t.on_two(t.compare)),
    )
    add = _family("arithmetic", Kind.SUM, ("add", "the sum", t.on_two(lambda a, b: a + b)))
    subtract = _family("arithmetic", Kind.DIFFERENCE, ("subtract", "the difference", t.on_two(lambda a, b: a - b)))
    return [*numbers, *pairs, *add, *subtract]


def _word_pairs() -> list[Skill]:
    return _family(
        "two words",
        Kind.WORDS,
        ("interleave", "letters of both by turns", t.on_words(t.interleave)),
        ("swap-words", "the second word first", t.on_words(lambda a, b: f"{b} {a}")),
        ("initials", "the first letters", t.on_words(lambda a, b: a[0] + b[0])),
        ("second-word", "the second word", t.on_words(lambda _, b: b)),
        ("snake-case", "an underscore between", t.on_words(lambda a, b: f"{a}_{b}")),
        ("camel-case", "joined, the second with a capital", t.on_words(lambda a, b: a + b.capitalize())),
        ("title-case", "both with a capital", str.title),
    )


SKILLS: tuple[Skill, ...] = (
    *_ciphers(),
    *_place_ciphers(),
    *_orders(),
    *_selections(),
    *_growths(),
    *_cases(),
    *_formats(),
    *_codes(),
    *_digits(),
    *_arithmetic(),
    *_word_pairs(),
)
