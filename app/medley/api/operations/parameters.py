"""Parameters that several operations take, in paths and in queries."""

from __future__ import annotations

from typing import Any

from medley.api.openapi import Parameter

_ID = "32 hexadecimal digits after the prefix"
PATH_PARAMETERS: dict[str, tuple[str, Any]] = {
    "job_id": (f"job_ and {_ID}.", "job_0193f5c2a1b47d3e8f6a5b4c3d2e1f00"),
    "batch_id": (f"batch_ or sweep_ and {_ID}.", "batch_0193f5c2a1b47d3e8f6a5b4c3d2e1f00"),
    "sweep_id": (f"sweep_ and {_ID}, or the sweep's name.", "nightly"),
    "name": ("The adapter's name.", "caesar-3"),
    "tenant": ("The other tenant's name.", "globex"),
    "owner": ("The name of the tenant whose adapter it is.", "acme"),
    "webhook_id": (f"wh_ and {_ID}.", "wh_0193f5c2a1b47d3e8f6a5b4c3d2e1f00"),
    "file_id": (f"file_ and {_ID}.", "file_0193f5c2a1b47d3e8f6a5b4c3d2e1f00"),
    "model": ("The base model's name, or an adapter as jobs name it.", "caesar-3"),
    "key_id": ("mk_ and 16 hexadecimal digits: the key's public part.", "mk_0123456789abcdef"),
}


def most(high: int, default: int) -> Parameter:
    schema = {"type": "integer", "minimum": 1, "maximum": high, "default": default}
    return Parameter("limit", "The most to list.", schema, 100)


TEXT = {"type": "string"}
BEFORE = Parameter("before", "The id from which to go on, as `next` gave it.", TEXT, "batch_" + "0193f5c2a1b47d3e" * 2)
AFTER_NAME = Parameter("after", "The name from which to go on, as `next` gave it.", TEXT, "caesar-3")
WAIT = Parameter(
    "wait",
    "Seconds to wait for something new, if there is nothing yet.",
    {"type": "number", "minimum": 0, "maximum": 60, "default": 0},
    0.5,
)
