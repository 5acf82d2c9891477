"""An endpoint for webhooks on this machine: keeps what it was sent, and answers as it is told."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        event: dict[str, Any] = msgspec.json.decode(self.body)
        return event


@dataclass
class Receiver:
    """`statuses` are answered one after the other, then 204 for ever. A status of 0 is no answer at all."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    location: str | None = None  # for an answer that redirects
    received: list[Received] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)


# Of the host "hooks.example", signed by itself, for a hundred years; it secures nothing.
TEST_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBojCCAUegAwIBAgIUWnJ01u+lCf9Ikh1dvJSkDfTmNYEwCgYIKoZIzj0EAwIw
GDEWMBQGA1UEAwwNaG9va3MuZXhhbXBsZTAgFw0yNjExMjIwODE2MDRaGA8yMTI2
MTAyOTA4MTYwNFowGDEWMBQGA1UEAwwNaG9va3MuZXhhbXBsZTBZMBMGByqGSM49
AgEGCCqGSM49AwEHA0IABLsUUcLsnQMlEEhMwPxZ2H5sJgDyH3WD8MU65/JUnc0d
La+boS98bXYgMDgnAsM8KR9V5emFRAc4q8csr6+NZG6jbTBrMB0GA1UdDgQWBBT9
5OcIAl3p6Lxndff8T7YRtls9wjAfBgNVHSMEGDAWgBT95OcIAl3p6Lxndff8T7YR
tls9wjAPBgNVHRMBAf8EBTADAQH/MBgGA1UdEQQRMA+CDWhvb2tzLmV4YW1wbGUw
CgYIKoZIzj0EAwIDSQAwRgIhANOVkel91kdqMf9czmx+QqN0qCSbqFMXrmqcEsx3
O3OmAiEAsABN8FAKJrhJTx5JQJkBAikytmMYw5n2CMSX6xczMrI=
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgLkAc6l25n1UsLGVW
fk+YRNFnMzRiy0ABKE111ziTXbuhRANCAAS7FFHC7J0DJRBITMD8Wdh+bCYA8h91
g/DFOufyVJ3NHS2vm6EvfG12IDA4JwLDPCkfVeXphUQHOKvHLK+vjWRu
-----END PRIVATE KEY-----
"""


@contextmanager
def receiving(certificate: Path | None = None) -> Iterator[Receiver]:
    """certificate: a file of `TEST_CERTIFICATE`, for an endpoint that speaks TLS."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.received.append(Received(self.path, dict(self.headers), body))
            status = receiver.statuses.pop(0) if receiver.statuses else 204
            if status == 0:  # trickles: a header that never ends
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not receiver.stop.wait(0.05):
                    try:
                        self.wfile.write(b"x")
                    except OSError:
                        return
                return
            self.send_response(status)
            if receiver.location is not None:
                self.send_header("Location", receiver.location)
            self.end_headers()

        def do_GET(self) -> None:  # what a redirect would become
            self.do_POST()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    receiver.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.stop.set()
        server.shutdown()
        thread.join()
        server.server_close()
