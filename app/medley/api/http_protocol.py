"""HTTP as the server parses it, within limits on all that is not body: its bytes, and the time a head may take.

The parser itself collects a header of any length in memory before anyone is asked who calls; so it does with what may
stand between the chunks of a body and after them.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 64 << 10  # request line and headers; the defaults of a batch travel in the query
MAX_HEADERS = 100
MAX_FRAMING_RATIO = 8  # bytes about chunks for each byte in them: chunks of one byte have five
HEAD_TIMEOUT_S = 20.0  # from a request's first byte to its last header

_REFUSAL = b'{"error":{"code":"too_large","message":"the request line and headers have more than %d bytes"}}'


class BoundedProtocol(HttpToolsProtocol):
    """Answers 431 to a head that is too long, and hangs up on one that does not come to its end."""

    _num_bytes = 0  # of the present message
    _num_body_bytes = 0
    _is_in_head = True
    _overdue: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        if self._is_in_head and self._overdue is None:
            self._overdue = asyncio.get_running_loop().call_later(HEAD_TIMEOUT_S, self._hang_up)
        self._num_bytes += len(data)
        super().data_received(data)
        if self._num_bytes - self._num_body_bytes > MAX_HEAD_BYTES + MAX_FRAMING_RATIO * self._num_body_bytes:
            self._refuse()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            # httptools makes this an error of the parser, which is answered 400.
            raise ValueError("too many headers")

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_in_head, self._num_bytes, self._num_body_bytes = True, 0, 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def _end_head(self) -> None:
        self._is_in_head = False
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _refuse(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if not is_answering and not self.transport.is_closing():
            body = _REFUSAL % MAX_HEAD_BYTES
            head = b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\n"
            self.transport.write(head + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        self._hang_up()

    def _hang_up(self) -> None:
        self._end_head()
        self.transport.close()
