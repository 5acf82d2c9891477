"""Decode JSON that a stranger wrote, within limits that hold before anything is built from it.

Knows nothing of what the JSON means. A size, a depth, no key twice in one object, no NaN or infinity,
no number beyond float64: what two readers could understand differently is refused here, once.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

MAX_DEPTH = 16  # PEFT and Hugging Face configurations nest 3 deep

# The next bracket or the end, past whole strings, so that a bracket inside one does not count. Possessive, with the
# closing quote optional, and matching from wherever it is tried: so one pass is linear whatever stands there.
_NEXT_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+"?)*+([\[\]{}]|\Z)', re.DOTALL)


def decode_strict(data: bytes, *, max_bytes: int) -> Any:
    """The value in `data` (UTF-8). Raises ValueError that says what is wrong and where it stands.

    max_bytes: refuses longer input before it is parsed. Nesting beyond MAX_DEPTH is refused the same way.
    """
    if len(data) > max_bytes:
        raise ValueError(f"{len(data)} bytes, the limit is {max_bytes}")
    _check_depth(data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    if "\\u" in text:
        _check_escapes(value)
    return value


def _check_escapes(value: Any) -> None:
    """Half of a surrogate pair can be escaped, and then neither stored nor sent on."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("an escaped half of a surrogate pair") from None


def shown_name(name: str) -> str:
    """A stranger's name, made safe to print and to store: escaped, at most 160 characters."""
    return repr(name)[1:-1][:160]


def _check_depth(data: bytes) -> None:
    depth = 0
    for match in _NEXT_BRACKET.finditer(data):
        if match[1]:
            depth += 1 if match[1] in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} at byte {match.start(1)}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return value


def _bounded(text: str) -> int:
    if len(text) > 20:  # 2**63 has 19 digits
        raise ValueError(f"the number {text[:40]} is out of range")
    return int(text)
