"""Structured output: what a job's text may be held to, and the limits that hold before anything is compiled from it.

Only size, form and depth are judged here; whether a grammar can be compiled is the worker's to find out.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from medley.spec.errors import Fault

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 32  # objects and arrays in each other
MAX_REGEX_BYTES = 8 << 10
MAX_CHOICES = 1_000
MAX_CHOICE_BYTES = 64 << 10  # of all choices together


class Grammar(NamedTuple):
    """What a text must be. text: a JSON schema, a regular expression, or a JSON array of the texts to choose from."""

    kind: Literal["json_schema", "regex", "choice"]
    text: str


def schema_text(schema: dict[str, Any]) -> str:
    """A schema as it is kept, its properties in the order given."""
    return msgspec.json.encode(schema).decode()


def schema_faults(field: str, schema: str | None) -> list[Fault]:
    """What is wrong with the JSON text of a schema."""
    if schema is None:
        return []
    num_bytes = len(schema.encode(errors="replace"))
    if num_bytes > MAX_SCHEMA_BYTES:
        return [Fault(field=field, got=f"{num_bytes} bytes", wanted=f"at most {MAX_SCHEMA_BYTES} bytes")]
    try:
        value = msgspec.json.decode(schema)
    except (ValueError, RecursionError) as error:
        return [Fault(field=field, got="no JSON", wanted=f"a JSON object: {str(error)[:200]}")]
    if not isinstance(value, dict):
        return [Fault(field=field, got=f"JSON that is no object: {schema[:40]!r}", wanted="a JSON object")]
    depth = _depth(value)
    if depth > MAX_SCHEMA_DEPTH:
        return [Fault(field=field, got=f"a depth of {depth}", wanted=f"a depth of at most {MAX_SCHEMA_DEPTH}")]
    return _text_faults(field, schema)


def regex_faults(field: str, regex: str | None) -> list[Fault]:
    """What is wrong with a regular expression before it is compiled."""
    if regex is None:
        return []
    num_bytes = len(regex.encode(errors="replace"))
    if not 1 <= num_bytes <= MAX_REGEX_BYTES:
        return [Fault(field=field, got=f"{num_bytes} bytes", wanted=f"1 to {MAX_REGEX_BYTES} bytes")]
    return _text_faults(field, regex)


def choice_faults(field: str, choice: tuple[str, ...]) -> list[Fault]:
    """What is wrong with the texts of a choice."""
    if len(choice) > MAX_CHOICES:
        return [Fault(field=field, got=f"{len(choice)} texts", wanted=f"at most {MAX_CHOICES}")]
    num_bytes = sum(len(text.encode(errors="replace")) for text in choice)
    if num_bytes > MAX_CHOICE_BYTES:
        return [Fault(field=field, got=f"{num_bytes} bytes", wanted=f"at most {MAX_CHOICE_BYTES} bytes together")]
    found = [
        Fault(field=f"{field}[{i}]", got="an empty text", wanted="a text") for i, text in enumerate(choice) if not text
    ]
    for i, text in enumerate(choice):
        found += _text_faults(f"{field}[{i}]", text)
    return found


def _text_faults(field: str, text: str) -> list[Fault]:
    # PostgreSQL keeps neither, and no model writes them.
    if "\0" in text:
        return [Fault(field=field, got="a NUL character", wanted="text without NUL")]
    try:
        text.encode()
    except UnicodeEncodeError:
        return [Fault(field=field, got="half of a surrogate pair", wanted="Unicode text")]
    return []


def _depth(value: object) -> int:
    """Of nested objects and arrays, without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return depth
