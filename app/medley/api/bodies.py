"""Request bodies as they arrive: whole in memory, or spooled with their digest.

A large upload is spooled before its transaction begins, so that a slow sender holds neither a thread, nor a
connection, nor locks; memory stays constant. The bytes are bounded by the body limit.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from fastapi import Request

from medley.api.errors import TooLarge
from medley.spec.errors import Fault

SPOOL_BYTES = 4 << 20  # beyond this a spooled body goes to a file
MAX_VALUES = 2_000_000  # of JSON that is decoded at once
READ_BYTES = 1 << 20  # read from it at once: some thousands of lines

# Past whole texts, so that a comma inside one does not count. Possessive: one pass is linear whatever stands there.
_NEXT_COMMA = re.compile(rb'(?:[^",]++|"(?:[^"\\]++|\\.)*+"?)*+,', re.DOTALL)


async def read_whole(request: Request) -> tuple[bytes, bytes]:
    """(the body, its SHA-256). Raises TooLarge for JSON of so many values that they would take too much memory."""
    chunks = [chunk async for chunk in request.stream()]
    body = b"".join(chunks)
    # Decoded, the shortest values take thirty times their bytes.
    if body.count(b",") > MAX_VALUES and _has_more_values(body, MAX_VALUES):
        raise TooLarge(f"the body has more than {MAX_VALUES} JSON values; send jobs as a file of lines")
    return body, hashlib.sha256(body).digest()


def _has_more_values(data: bytes, limit: int) -> bool:
    """Whether more than `limit` commas stand outside of texts."""
    return any(num >= limit for num, _ in enumerate(_NEXT_COMMA.finditer(data)))


@dataclass(frozen=True)
class Spooled:
    """A body on disk or, where small, in memory. `file` stands at its beginning."""

    file: IO[bytes]
    sha256: bytes

    def close(self) -> None:
        self.file.close()


async def spool(request: Request) -> Spooled:
    """The body, spooled. The caller closes it."""
    file = tempfile.SpooledTemporaryFile(SPOOL_BYTES)  # noqa: SIM115 - the caller closes it
    digest = hashlib.sha256()
    try:
        async for chunk in request.stream():
            digest.update(chunk)
            file.write(chunk)
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return Spooled(file, digest.digest())


def whole_lines(file: IO[bytes], max_line_bytes: int) -> Iterator[tuple[bytes, int]]:
    """(some whole lines, the number of the first) until the end. Raises TooLarge for a line beyond the limit."""
    rest, line = b"", 1
    while chunk := file.read(READ_BYTES):
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            lines = rest + head + newline
            yield lines, line
            line += lines.count(b"\n")
            rest = tail
        else:
            rest += tail
        if len(rest) > max_line_bytes:
            fault = Fault(
                field="body", got="a line without end", wanted=f"lines of at most {max_line_bytes} bytes", line=line
            )
            raise TooLarge(str(fault), [fault])
    if rest:
        yield rest, line
