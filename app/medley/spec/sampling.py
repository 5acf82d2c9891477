"""Sampling parameters of one job: the fields, their limits, and every fault of a value at once.

What structured output may ask for is judged in grammars.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from medley.spec.errors import Fault
from medley.spec.grammars import Grammar, choice_faults, regex_faults, schema_faults, schema_text

MAX_TOKENS_LIMIT = 32_768  # tokens one job may generate; the model's own length cuts sooner
MAX_STOP = 16  # stop strings or ids of one job
MAX_STOP_CHARS = 256  # characters of one stop string
MAX_LOGIT_BIAS = 1_024  # entries
MAX_LOGPROBS = 20  # alternatives a token
MAX_SAMPLES = 128  # of one prompt in one batch
SEED_LIMIT = 2**63  # seeds are 0 <= seed < 2**63, so that they fit a signed 64-bit column


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How one job's tokens are drawn.

    The order is: logit_bias and penalties, then temperature, then top_k, top_p and min_p on the result,
    then argmax(logit + Gumbel(hash(seed, position, token id))). `temperature` 0 takes the plain argmax.

    max_tokens: tokens to generate at the most. min_tokens: end tokens and stops are ignored before this many.
    top_k: keep the k best (None: all). top_p: keep the smallest set with at least this mass.
    min_p: keep tokens with at least this share of the best token's probability.
    repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output.
    presence_penalty, frequency_penalty: subtracted once, or once an occurrence, for tokens seen in the output.
    logit_bias: token id -> added to its logit (JSON keys are decimal strings).
    seed: None draws one when the job is created, so that a rerun of the job repeats its tokens.
    stop: strings that end the text; they are cut from it. stop_token_ids: ids that end it.
    ignore_eos: go on past the model's own end tokens.
    top_logprobs: alternatives that are reported beside each generated (or scored) token, the likeliest first.
    prompt_logprobs: report each prompt token's log-probability, with so many alternatives; None: do not. With it,
    max_tokens may be 0. Log-probabilities are the model's own, before bias, penalties, temperature and filters.
    json_schema, regex, choice: what the text must be, one of them at the most; a schema may be given as a dict or as
    its JSON text, and is kept as text, since the order of its properties counts.
    """

    max_tokens: int = 256
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    prompt_logprobs: int | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Lists become tuples, as decoding makes them, a schema its text. Raises TypeError for a string as a list."""
        if type(self.stop) is not tuple or type(self.stop_token_ids) is not tuple or type(self.choice) is not tuple:
            for name in ("stop", "stop_token_ids", "choice"):
                self._make_tuple(name)
        if isinstance(self.json_schema, dict):
            msgspec.structs.force_setattr(self, "json_schema", schema_text(self.json_schema))

    def _make_tuple(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            raise TypeError(f"{name}: got {value[:40]!r}, wanted a list")
        msgspec.structs.force_setattr(self, name, tuple(value))

    @property
    def grammar(self) -> Grammar | None:
        """What the text must be, None where it is free."""
        if self.json_schema is not None:
            assert isinstance(self.json_schema, str)
            return Grammar("json_schema", self.json_schema)
        if self.regex is not None:
            return Grammar("regex", self.regex)
        return Grammar("choice", msgspec.json.encode(self.choice).decode()) if self.choice else None

    def faults(self, at: str = "sampling") -> list[Fault]:
        """Every value out of its range, as `Fault`s that name the field, what it got and what it wanted."""
        found: list[Fault] = []

        def want(ok: bool, field: str, got: object, wanted: str) -> None:
            if not ok:
                found.append(Fault(field=f"{at}.{field}", got=repr(got)[:80], wanted=wanted))

        def number(field: str, low: float, high: float) -> None:
            value = getattr(self, field)
            want(math.isfinite(value) and low <= value <= high, field, value, f"a number from {low:g} to {high:g}")

        least = 1 if self.prompt_logprobs is None else 0
        wanted = f"{least} to {MAX_TOKENS_LIMIT}"
        want(least <= self.max_tokens <= MAX_TOKENS_LIMIT, "max_tokens", self.max_tokens, wanted)
        want(0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, "0 to max_tokens")
        number("temperature", 0, 100)
        want(self.top_k is None or 1 <= self.top_k < 2**31, "top_k", self.top_k, "1 or more, or null for all")
        want(0 < self.top_p <= 1, "top_p", self.top_p, "more than 0, at most 1")
        number("min_p", 0, 1)
        number("repetition_penalty", 0.01, 100)
        number("presence_penalty", -2, 2)
        number("frequency_penalty", -2, 2)
        want(
            len(self.logit_bias) <= MAX_LOGIT_BIAS,
            "logit_bias",
            len(self.logit_bias),
            f"at most {MAX_LOGIT_BIAS} entries",
        )
        for token, bias in self.logit_bias.items():
            want(
                0 <= token < 2**31 and -100 <= bias <= 100,
                f"logit_bias.{token}",
                bias,
                "a token id with a bias from -100 to 100",
            )
        want(self.seed is None or 0 <= self.seed < SEED_LIMIT, "seed", self.seed, "0 to 2**63 - 1")
        want(len(self.stop) <= MAX_STOP, "stop", len(self.stop), f"at most {MAX_STOP} strings")
        for i, text in enumerate(self.stop):
            want(1 <= len(text) <= MAX_STOP_CHARS, f"stop[{i}]", text[:40], f"1 to {MAX_STOP_CHARS} characters")
        want(
            len(self.stop_token_ids) <= MAX_STOP, "stop_token_ids", len(self.stop_token_ids), f"at most {MAX_STOP} ids"
        )
        want(
            all(0 <= t < 2**31 for t in self.stop_token_ids),
            "stop_token_ids",
            self.stop_token_ids,
            "token ids of 0 or more",
        )
        for field in ("top_logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            want(value is None or 0 <= value <= MAX_LOGPROBS, field, value, f"0 to {MAX_LOGPROBS}")
        return found + self._structure_faults(at)

    def _structure_faults(self, at: str) -> list[Fault]:
        found: list[Fault] = []
        given = [name for name in ("json_schema", "regex", "choice") if getattr(self, name) not in (None, ())]
        if not given:
            return found
        if len(given) > 1:
            found.append(Fault(field=f"{at}.{given[0]}", got=" and ".join(given), wanted="one of them at the most"))
        # What ends the text is the grammar's to say.
        for field in ("ignore_eos", "min_tokens"):
            if value := getattr(self, field):
                found.append(Fault(field=f"{at}.{field}", got=repr(value), wanted=f"no such field beside {given[0]}"))
        assert not isinstance(self.json_schema, dict)
        found += schema_faults(f"{at}.json_schema", self.json_schema)
        found += regex_faults(f"{at}.regex", self.regex)
        return found + choice_faults(f"{at}.choice", self.choice)


def sample_seed(seed: int, sample_idx: int) -> int:
    """The seed of one of several samples that share `seed`: the first has it, the others a hash of it.

    SplitMix64 (Steele, Lea, Flood 2014), from `seed` on.
    """
    if sample_idx == 0:
        return seed
    mask = (1 << 64) - 1
    value = (seed + sample_idx * 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return (value ^ (value >> 31)) % SEED_LIMIT


FIELDS = SamplingParams.__struct_fields__


def parse_sampling(fields: Mapping[str, Any], at: str = "sampling") -> tuple[SamplingParams | None, list[Fault]]:
    """SamplingParams from decoded JSON. Returns (params, []) or (None, every fault). Unknown fields are faults."""
    faults = [
        Fault(
            field=f"{at}.{name}", got=repr(value)[:80], wanted=f"no such field; the known ones are {', '.join(FIELDS)}"
        )
        for name, value in fields.items()
        if name not in FIELDS
    ]
    known: dict[str, Any] = {}
    hints = {f.name: f.type for f in msgspec.structs.fields(SamplingParams)}
    for name in FIELDS:
        if name in fields:
            try:
                # str_keys: JSON object keys are strings, logit_bias wants token ids.
                known[name] = msgspec.convert(fields[name], hints[name], str_keys=True)
            except msgspec.ValidationError as error:
                faults.append(Fault(field=f"{at}.{name}", got=repr(fields[name])[:80], wanted=str(error)))
    if faults:
        return None, faults
    params = SamplingParams(**known)
    faults = params.faults(at)
    return (None, faults) if faults else (params, [])
