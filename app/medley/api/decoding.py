"""What a stranger sent, decoded into typed values with every fault at once: JSON objects and query strings.

The whole is decoded in one go first; only where that fails is it taken apart, field by field, to name each fault.
Depth is bounded by the decoder, sizes by the body limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec
from fastapi import Request
from starlette.datastructures import QueryParams

from medley.api.errors import FaultList, InvalidRequest
from medley.spec.errors import Fault

MAX_SHOWN = 80  # characters of a wrong value in a fault
MAX_LOOKED_AT = 2 << 20  # bytes of JSON that are gone through key by key

S = TypeVar("S", bound=msgspec.Struct)
T = TypeVar("T")

# msgspec ends its messages with where in the value it was: "Expected `int`, got `str` - at `$.a[3]`".
_PLACE = re.compile(r" - at `\$?([^`]*)`$")
_EXPECTED = re.compile(r"Expected (.+?)(?:, got .+)?")
_WHOLE = re.compile(r"-?[0-9]{1,19}")
Data = bytes | bytearray | memoryview | msgspec.Raw
DECODE_ERRORS = (ValueError, RecursionError)  # msgspec's errors and a bad UTF-8 sequence are ValueErrors


@dataclass
class Partial(Generic[S]):
    """An object of which some fields may be unusable: `value` has the others, `bad` names those."""

    value: S | None
    faults: list[Fault] = field(default_factory=list)
    bad: frozenset[str] = frozenset()


def decode_fields(data: Data, kind: type[S], *, unknown: dict[str, str] | None = None) -> Partial[S]:
    """A JSON object as `kind`. `unknown` says what is wanted instead of certain unknown fields.

    Where fields are faulty the value has their defaults, and is None where one without a default is faulty.
    """
    repeated: list[Fault] = []
    if (twice := repeated_key(data)) is not None:
        repeated.append(Fault(field=twice[:200], got="this field again", wanted="each field once"))
    try:
        return Partial(msgspec.json.decode(data, type=kind), repeated, frozenset(fault.field for fault in repeated))
    except DECODE_ERRORS:
        pass
    try:
        raw = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except DECODE_ERRORS as error:
        return Partial(None, [Fault(field="body", got=shown(data), wanted=f"a JSON object: {reason(error)}")])
    known = {f.encode_name: f for f in msgspec.structs.fields(kind)}
    faults = [_unknown(name, value, known, unknown or {}) for name, value in raw.items() if name not in known]
    values: dict[str, Any] = {}
    bad: set[str] = {name for name in raw if name not in known}
    for name, spec in known.items():
        if name in raw:
            try:
                values[spec.name] = msgspec.json.decode(raw[name], type=spec.type)
            except DECODE_ERRORS as error:
                faults.append(_mistyped(name, raw[name], error))
                bad.add(name)
        elif spec.required:
            faults.append(Fault(field=name, got="nothing", wanted="this field"))
            bad.add(name)
    missing = any(spec.required and spec.name not in values for spec in known.values())
    bad |= {fault.field for fault in repeated}
    return Partial(None if missing else kind(**values), repeated + faults, frozenset(bad))


class _Repeated(Exception):
    """A key that stands twice in one object."""


def repeated_key(data: Data) -> str | None:
    """A key that stands twice in one object of the JSON in `data`, or None: also where `data` is no JSON.

    The decoder takes the last, another reader may take the first. Of more than `MAX_LOOKED_AT` bytes the largest
    field's value is left out, and whoever looks at its parts looks for such keys in them.
    """
    try:
        if len(memoryview(data)) > MAX_LOOKED_AT:
            fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
            name, largest = max(fields.items(), key=lambda item: len(memoryview(item[1])))
            rest = bytes(memoryview(data)).replace(bytes(largest), b"0", 1)
            if len(rest) > MAX_LOOKED_AT:  # no request has two fields of such a size
                return name
            data = rest
        json.loads(bytes(data), object_pairs_hook=_check_unique)
    except _Repeated as error:
        return str(error)
    except DECODE_ERRORS:
        pass
    return None


def _check_unique(pairs: list[tuple[str, Any]]) -> None:
    if len({key for key, _ in pairs}) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Repeated(key)
            seen.add(key)


def decode_body(data: Data, kind: type[S]) -> S:
    """A JSON object as `kind`. Raises InvalidRequest with every fault."""
    found = decode_fields(data, kind)
    if found.faults or found.value is None:
        raise InvalidRequest.of(found.faults)
    return found.value


def reason(error: Exception) -> str:
    """What is wrong with JSON, in few words."""
    return "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]


def wanted_by(error: Exception) -> str:
    """What a decoder that raised `error` wanted, without what it got."""
    if isinstance(error, UnicodeDecodeError):
        return "UTF-8"
    message = _PLACE.sub("", reason(error))
    if (expected := _EXPECTED.fullmatch(message)) is not None:
        return expected[1]
    if message.startswith("Invalid enum value"):
        return "one of the values that /openapi.json lists"
    return message


def shown(data: Data) -> str:
    """The beginning of what was sent."""
    return bytes(memoryview(data)[: 4 * MAX_SHOWN]).decode(errors="replace")[:MAX_SHOWN] or "nothing"


def _unknown(name: str, value: msgspec.Raw, known: Iterable[str], instead: dict[str, str]) -> Fault:
    wanted = instead.get(name) or f"no such field; the known ones are {', '.join(known)}"
    return Fault(field=name[:200], got=shown(value), wanted=wanted)


def _mistyped(name: str, value: msgspec.Raw, error: Exception) -> Fault:
    place = _PLACE.search(reason(error))
    where = place[1] if place else ""
    return Fault(field=f"{name}{where}", got=shown(value), wanted=wanted_by(error))


class Query:
    """The query string, taken parameter by parameter; what is wrong or left over is refused together."""

    def __init__(self, request: Request) -> None:
        self._left: QueryParams = request.query_params
        self._taken: set[str] = set()
        self.faults = FaultList()

    def text(self, name: str) -> str | None:
        """An absent or empty parameter is None."""
        self._taken.add(name)
        return self._left.get(name) or None

    def whole(self, name: str, default: int, *, low: int, high: int) -> int:
        text = self.text(name)
        if text is None:
            return default
        # int() also reads blanks, underscores and other scripts' digits.
        if _WHOLE.fullmatch(text) is None or not low <= int(text) <= high:
            self.refuse(name, f"a whole number from {low} to {high}")
            return default
        return int(text)

    def seconds(self, name: str, *, high: float) -> float:
        """Seconds from 0 to `high`; 0 where absent."""
        wanted = f"seconds from 0 to {high:g}"
        value = self.typed(name, float, wanted)
        if value is None:
            return 0.0
        if not 0 <= value <= high:
            self.refuse(name, wanted)
            return 0.0
        return value

    def typed(self, name: str, kind: type[T], wanted: str) -> T | None:
        """The parameter as `kind` (what msgspec makes of its text)."""
        value = self.text(name)
        if value is None:
            return None
        try:
            return msgspec.convert(value, kind, strict=False)
        except msgspec.ValidationError:
            self.refuse(name, wanted)
            return None

    def refuse(self, name: str, wanted: str) -> None:
        self.faults.add(Fault(field=name, got=repr(self._left.get(name))[:MAX_SHOWN], wanted=wanted))

    def end(self) -> None:
        """Raises InvalidRequest with every fault, among them unknown parameters and those that stand twice."""
        for name in self._left:
            if name in self._taken:
                if len(found := self._left.getlist(name)) > 1:
                    wanted = "each parameter once"
                    self.faults.add(Fault(field=name, got=f"it {len(found)} times", wanted=wanted))
            else:
                wanted = f"no such parameter; the known ones are {', '.join(sorted(self._taken)) or 'none'}"
                self.faults.add(Fault(field=name[:200], got=self._left[name][:MAX_SHOWN], wanted=wanted))
        self.faults.raise_any()
