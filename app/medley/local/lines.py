"""Many children's output as one readable log: whole lines, each after its child's name.

It knows nothing of processes. Lines of different children never mix, and colours mark them on a terminal only.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from typing import IO

_COLOURS = (36, 32, 33, 35, 34, 96, 92, 93, 95, 94)
_CHUNK_BYTES = 1 << 16
# A child that writes no newline is broken into lines of this size.
_MAX_LINE_BYTES = 1 << 16


class LineLog:
    """Writes `name | line`, or a JSON object a line. A reader that went away ends the log, not the writer."""

    def __init__(self, stream: IO[str] | None = None, *, name_width: int = 10, as_json: bool = False) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._width = name_width
        self._as_json = as_json
        self._has_colours = self._stream.isatty()

    def write(self, name: str, line: str) -> None:
        """One line, without its newline."""
        try:
            self._stream.write(self._form(name, line) + "\n")
            self._stream.flush()
        except (BrokenPipeError, ValueError):
            self._stream = _nowhere()

    def _form(self, name: str, line: str) -> str:
        if self._as_json:
            return json.dumps({"process": name, "line": line})
        head = f"{name:<{self._width}} |"
        if self._has_colours:
            head = f"\x1b[{_COLOURS[zlib.crc32(name.encode()) % len(_COLOURS)]}m{head}\x1b[0m"
        return f"{head} {line}"


class LineReader:
    """Cuts one pipe's bytes into lines for a log."""

    def __init__(self, name: str, log: LineLog) -> None:
        self._name = name
        self._log = log
        self._rest = b""

    def read_from(self, fd: int) -> bool:
        """Read what is there; False at the end of the pipe, when the unfinished line is written too."""
        try:
            data = os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            return True
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._rest and (not data or len(self._rest) > _MAX_LINE_BYTES):
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            if text:
                self._log.write(self._name, text)
        return bool(data)


def _nowhere() -> IO[str]:
    return open(os.devnull, "w")  # noqa: PTH123 - lives as long as the process
