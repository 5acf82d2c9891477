"""A bad line between a client and the real service: it deals with requests as told, then passes everything on."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import httpx


class Fate(Enum):
    """What becomes of a request."""

    DROPPED = "the connection ends before the service hears of it"
    BUSY = "429 with Retry-After"
    AWAY = "503"
    UNHEARD = "the service answers, and the answer is lost"


class BadLine(ThreadingHTTPServer):
    """`fates` are met by the next requests, one each; `num_requests` counts all."""

    daemon_threads = True

    def __init__(self, target_url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.fates: list[Fate] = []
        self.num_requests = 0
        self.service = httpx.Client(base_url=target_url)

    def server_bind(self) -> None:
        # HTTPServer would look its own name up.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]


class _Handler(BaseHTTPRequestHandler):
    server: BadLine

    def _deal(self) -> None:
        self.close_connection = True
        self.server.num_requests += 1
        fate = self.server.fates.pop(0) if self.server.fates else None
        body = self._read_body()
        if fate is Fate.DROPPED:
            return
        if fate in (Fate.BUSY, Fate.AWAY):
            self.send_response(429 if fate is Fate.BUSY else 503)
            if fate is Fate.BUSY:
                self.send_header("Retry-After", "1")
            self.end_headers()
            return
        names = ("Authorization", "Content-Type", "Idempotency-Key")
        headers = {name: self.headers[name] for name in names if name in self.headers}
        answer = self.server.service.request(self.command, self.path, content=body, headers=headers)
        if fate is Fate.UNHEARD:
            return
        self.send_response(answer.status_code)
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = do_PUT = do_DELETE = _deal  # noqa: N815 - the names that the base class calls

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextmanager
def bad_line(target_url: str) -> Iterator[BadLine]:
    """A bad line to the service at `target_url`, until the block ends."""
    server = BadLine(urlsplit(target_url).geturl())
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), name="bad-line")
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.service.close()
