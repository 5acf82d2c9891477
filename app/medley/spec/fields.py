"""Typed look-ups in a decoded configuration, each wrong value a `Fault` and reading goes on.

Owns how a value is judged; which keys there are and what they mean is for the caller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medley.spec.errors import Fault
from medley.spec.strict_json import decode_strict

MAX_EXTENT = 1 << 24  # no dimension of a decoder is near this; keeps products far from overflow


def read_object(path: Path, max_bytes: int, faults: list[Fault]) -> dict[str, Any] | None:
    """The JSON object in the file, or None with a fault added."""
    try:
        with path.open("rb") as file:
            value = decode_strict(file.read(max_bytes + 1), max_bytes=max_bytes)
    except OSError as error:
        faults.append(Fault(field=path.name, got=error.strerror or "an error", wanted="a file that can be read"))
        return None
    except ValueError as error:
        faults.append(Fault(field=path.name, got=str(error), wanted="a JSON object"))
        return None
    if not isinstance(value, dict):
        faults.append(Fault(field=path.name, got=type(value).__name__, wanted="a JSON object"))
        return None
    return value


class Fields:
    """Typed look-ups in a configuration. An absent key takes its default."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], faults: list[Fault]) -> None:
        self.values, self.defaults, self.faults = values, defaults, faults

    def get(self, key: str) -> Any:
        return self.values[key] if key in self.values else self.defaults.get(key)

    def refuse(self, key: str, wanted: str) -> None:
        self.faults.append(Fault(field=key, got=repr(self.get(key))[:80], wanted=wanted))

    def extent(self, key: str, default: int | None = None, limit: int = MAX_EXTENT) -> int:
        """A whole number from 1 to `limit`; 1 stands in where it is refused, so that reading can go on."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) is int and 1 <= value <= limit:
            return value
        self.refuse(key, f"a whole number from 1 to {limit}")
        return 1

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) in (int, float) and math.isfinite(value) and value > 0:
            return float(value)
        self.refuse(key, "a number above 0")
        return 1.0

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and type(value) is not bool:
            self.refuse(key, "true or false")
        return value is True

    def only(self, key: str, *allowed: object) -> None:
        """Refuses a value that is present, not null and none of `allowed`."""
        if self.get(key) is not None and self.get(key) not in allowed:
            self.refuse(key, " or ".join(map(repr, allowed)) if allowed else "no such key")
