"""A real S3-compatible server (moto's) over HTTP, behind a line that can be bad: for tests of remote stores."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import threading
import time
from collections.abc import Iterator
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "adapters"
SLOW_S = 0.3
_numbers = itertools.count(1)


class Fate(Enum):
    """What becomes of a request."""

    DROPPED = "the connection ends without an answer"
    AWAY = "503"
    CUT = "half of the answer's body, and the connection ends"
    CHANGED = "the answer's body, its last byte another"
    SLOW = "the answer comes late"


class S3Server(ThreadingHTTPServer):
    """`fates` are met by the next requests, one each; while `is_down`, all are dropped."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.target_port = port
        self.fates: list[Fate] = []
        self.is_down = False
        self.requests: list[str] = []
        self.client = boto3.session.Session().client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id="an access key",
            aws_secret_access_key="a secret key",
        )
        self.client.create_bucket(Bucket=BUCKET)

    def new_url(self) -> str:
        """A store of its own in the bucket."""
        return f"s3://{BUCKET}/store{next(_numbers)}"

    def environ(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {
            "MEDLEY_STORE_ENDPOINT": self.endpoint,
            "MEDLEY_STORE_REGION": "us-east-1",
            "MEDLEY_STORE_ACCESS_KEY": "an access key",
            "MEDLEY_STORE_SECRET_KEY": "a secret key",
        }

    def num_uploads(self) -> int:
        """Multipart uploads that are neither complete nor aborted."""
        return len(self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing: clients that go away are what is tested."""


class _Handler(BaseHTTPRequestHandler):
    server: S3Server
    protocol_version = "HTTP/1.1"

    def _deal(self) -> None:
        self.close_connection = True
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {self.path}")
        fate = self.server.fates.pop(0) if self.server.fates else None
        if self.server.is_down or fate is Fate.DROPPED:
            return
        if fate is Fate.AWAY:
            self._answer(503, [], b"", 0)
            return
        target = http.client.HTTPConnection("127.0.0.1", self.server.target_port)
        with contextlib.closing(target):
            target.request(self.command, self.path, body, dict(self.headers))
            answer = target.getresponse()
            data = answer.read()
        if fate is Fate.SLOW:
            time.sleep(SLOW_S)
        sent = data[: len(data) // 2] if fate is Fate.CUT else data
        if fate is Fate.CHANGED:
            sent = data[:-1] + bytes([data[-1] ^ 1])
        length = int(answer.headers.get("Content-Length", len(data)))
        self._answer(answer.status, answer.getheaders(), sent, length)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = _deal  # noqa: N815 - the names that the base class calls

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def running_s3() -> Iterator[S3Server]:
    """Serves until the block ends."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    server = S3Server(moto.get_host_and_port()[1])
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.02), name="s3")
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        server.client.close()
        moto.stop()
