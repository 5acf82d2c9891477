"""Ids: UUID version 7 inside, `<prefix>_<32 hex digits>` outside.

Version 7 ids grow with time, so rows made together lie together in a B-tree and creation order is id order.
"""

from __future__ import annotations

import os
import threading
import time
from uuid import UUID

# How far the clocks of hosts that make ids may lie apart, where what is older than an id is left out of a look-up.
CLOCKS_APART_S = 24 * 3600

JOB, BATCH, SWEEP, ADAPTER, REVISION, WORKER = "job", "batch", "sweep", "adapter", "rev", "worker"
GRANT, WEBHOOK, MESSAGE, FILE = "grant", "wh", "msg", "file"

_TAIL = (1 << 62) - 1  # the random bits of an id

_lock = threading.Lock()
_last = 0


def uuid7() -> UUID:
    """A UUIDv7 (RFC 9562, section 5.7), strictly increasing within this process."""
    return uuid7s(1)[0]


def uuid7s(num: int, *, after: UUID | None = None) -> list[UUID]:
    """`num` of them, in order; many at once cost less than one by one.

    after: they are above this one too, even where a host whose clock is ahead has made it.
    """
    global _last
    with _lock:
        # 48 bits of milliseconds, then 12 bits that count within one (method 3 of section 6.2).
        first = max(_last + 1, (time.time_ns() * 4096) // 1_000_000)
        _last = first + num - 1
    if after is not None:
        first = max(first, (after.int >> 80 << 12 | after.int >> 64 & 0xFFF) + 1)
    tails = memoryview(os.urandom(8 * num)).cast("Q")
    return [
        UUID(int=(stamp >> 12 << 80) | (0x7 << 76) | ((stamp & 0xFFF) << 64) | (0b10 << 62) | (tail & _TAIL))
        for stamp, tail in zip(range(first, first + num), tails, strict=True)
    ]


def first_id(unix_s: float) -> UUID:
    """The least id that a clock at `unix_s` makes; compares as such and names nothing."""
    return UUID(int=max(0, int(unix_s * 1000)) << 80)


def oldest_after(value: UUID) -> UUID:
    """The least id of what was made after `value`, by clocks up to `CLOCKS_APART_S` apart."""
    return first_id((value.int >> 80) / 1000 - CLOCKS_APART_S)


def public_id(prefix: str, value: UUID) -> str:
    """`public_id("job", u)` is `"job_" + u.hex`."""
    return f"{prefix}_{value.hex}"


def parse_id(prefix: str, text: str) -> UUID | None:
    """The UUID in `text`, or None where it is not an id of this kind."""
    head, _, digits = text.partition("_")
    if head != prefix or len(digits) != 32:
        return None
    try:
        value = UUID(hex=digits)
    except ValueError:
        return None
    # int() also reads blanks, signs, underscores and other scripts' digits; an id has one spelling.
    return value if value.hex == digits else None
