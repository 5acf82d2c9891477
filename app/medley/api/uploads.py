"""The two files of an adapter out of a multipart body, streamed: the configuration to memory, the weights to a file.

Exactly two parts, named as the files are; any other part, or a part twice, is refused. Names in the body are
compared and never used as paths.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import python_multipart
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from medley.api.errors import FaultList, InvalidRequest, TooLarge
from medley.spec.adapters import CONFIG_NAME, WEIGHTS_NAME
from medley.spec.errors import Fault
from medley.spec.peft_config import MAX_CONFIG_BYTES
from medley.spec.strict_json import shown_name

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

PARTS = (CONFIG_NAME, WEIGHTS_NAME)
MAX_HEADER_BYTES = 4 << 10  # of one part


class Upload:
    """The files of an upload; use as a context manager, which deletes the weights' file at the end."""

    def __init__(self, max_weights_bytes: int) -> None:
        self.config = bytearray()
        self._file = tempfile.NamedTemporaryFile(prefix="medley-upload-")  # noqa: SIM115 - closed by __exit__
        self._limits = {CONFIG_NAME: MAX_CONFIG_BYTES, WEIGHTS_NAME: max_weights_bytes}
        self._seen: dict[str, int] = {}
        self._faults = FaultList()
        self._header = bytearray()
        self._disposition = b""
        self._part: str | None = None
        self._ended = False

    @property
    def weights(self) -> BinaryIO:
        return cast(BinaryIO, self._file.file)

    @property
    def weights_path(self) -> Path:
        return Path(self._file.name)

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    async def receive(self, request: Request) -> None:
        """Reads the body. Raises InvalidRequest where it is not the two files, TooLarge beyond a limit."""
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            got = request.headers.get("content-type", "nothing")[:80]
            wanted = f"multipart/form-data with the parts {' and '.join(PARTS)}"
            raise InvalidRequest.of([Fault(field="Content-Type", got=got, wanted=wanted)])
        try:
            parser = python_multipart.MultipartParser(boundary, self._callbacks())
            async for chunk in request.stream():
                parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequest.of([Fault(field="body", got=str(error)[:200], wanted="multipart/form-data")]) from None
        self._check_parts()
        self._file.flush()

    def _callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }

    def _check_parts(self) -> None:
        if not self._ended:
            self._faults.add(Fault(field="body", got="a cut body", wanted="a closing boundary"))
        for name in PARTS:
            if name not in self._seen:
                self._faults.add(Fault(field=name, got="no such part", wanted="this file as a part of that name"))
        self._faults.raise_any()

    def _on_part_begin(self) -> None:
        self._header.clear()
        self._disposition = b""
        self._part = None

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._grow_header(data[start:end])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        if not self._header.endswith(b":") and b":" not in self._header:
            self._header += b":"
        self._grow_header(data[start:end])

    def _on_header_end(self) -> None:
        name, _, value = bytes(self._header).partition(b":")
        if name.strip().lower() == b"content-disposition":
            self._disposition = value.strip()
        self._header.clear()

    def _grow_header(self, data: bytes) -> None:
        self._header += data
        if len(self._header) > MAX_HEADER_BYTES:
            raise TooLarge(f"a part's header has more than {MAX_HEADER_BYTES} bytes")

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        if name not in PARTS or name in self._seen:
            got = f"{shown_name(name)!r}{' again' if name in self._seen else ''}"
            self._faults.add(Fault(field="body", got=f"a part {got}", wanted=f"the parts {' and '.join(PARTS)}, once"))
            return
        self._part = name
        self._seen[name] = 0

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        name = self._part
        if name is None:
            return
        self._seen[name] += end - start
        if self._seen[name] > self._limits[name]:
            raise TooLarge(f"{name} has more than {self._limits[name]} bytes, which is the limit")
        if name == CONFIG_NAME:
            self.config += data[start:end]
        else:
            self._file.write(data[start:end])

    def _on_end(self) -> None:
        self._ended = True
