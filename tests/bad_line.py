"""A bad line between a client and a real server: it deals with requests as told, and passes the others on."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Iterator
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar
from urllib.parse import urlsplit

SLOW_S = 0.3
_OF_THE_CONNECTION = ("content-length", "transfer-encoding", "connection")


class Fate(Enum):
    """What becomes of a request."""

    DROPPED = "the connection ends before the server hears of it"
    BUSY = "429 with Retry-After"
    AWAY = "503"
    UNHEARD = "the server answers, and the answer is lost"
    CUT = "half of the answer's body, and the connection ends"
    CHANGED = "the answer's body, its last byte another"
    SLOW = "the answer comes late"


class BadLine(ThreadingHTTPServer):
    """`fates` are met by the next requests, one each; while `is_down`, all are dropped. `requests` lists them."""

    daemon_threads = True

    def __init__(self, target_url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.target = urlsplit(target_url).netloc
        self.fates: list[Fate] = []
        self.is_down = False
        self.requests: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: clients that go away are what is tested."""


Line = TypeVar("Line", bound=BadLine)


class _Handler(BaseHTTPRequestHandler):
    server: BadLine
    protocol_version = "HTTP/1.1"

    def _deal(self) -> None:
        self.close_connection = True
        self.server.requests.append(f"{self.command} {self.path}")
        fate = self.server.fates.pop(0) if self.server.fates else None
        body = self._read_body()
        if self.server.is_down or fate is Fate.DROPPED:
            return
        if fate in (Fate.BUSY, Fate.AWAY):
            self._answer(*((429, [("Retry-After", "1")]) if fate is Fate.BUSY else (503, [])), b"", 0)
            return
        with contextlib.closing(http.client.HTTPConnection(self.server.target)) as target:
            target.request(self.command, self.path, body, self._without_connection(self.headers.items()))
            answer = target.getresponse()
            data = answer.read()
        if fate is Fate.UNHEARD:
            return
        if fate is Fate.SLOW:
            time.sleep(SLOW_S)
        sent = data[: len(data) // 2] if fate is Fate.CUT else data
        if fate is Fate.CHANGED:
            sent = data[:-1] + bytes([data[-1] ^ 1])
        length = int(answer.headers.get("Content-Length", len(data)))
        self._answer(answer.status, answer.getheaders(), sent, length)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in self._without_connection(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _without_connection(self, headers: Any) -> dict[str, str]:
        return {name: value for name, value in headers if name.lower() not in _OF_THE_CONNECTION}

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _deal  # noqa: N815 - the names that the base class calls

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def bad_line(target_url: str) -> Iterator[BadLine]:
    """A bad line to the server at `target_url`, until the block ends."""
    with serving(BadLine(target_url)) as line:
        yield line


@contextlib.contextmanager
def serving(line: Line) -> Iterator[Line]:
    """Passes on until the block ends."""
    thread = threading.Thread(target=lambda: line.serve_forever(poll_interval=0.02), name="bad-line")
    thread.start()
    try:
        yield line
    finally:
        line.shutdown()
        thread.join()
        line.server_close()
