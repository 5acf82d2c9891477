"""What a stranger may send before anyone asks who he is, and how far each field goes: refused early, and served on."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import psutil
import pytest
from api_server import Api, fields_of

from medley.api import http_protocol
from medley.config import Limits

LIMITS = Limits(max_body_bytes=1 << 20, max_prompt_bytes=1_000)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _still_serves(api: Api) -> Iterator[None]:
    yield
    assert api.anonymous.get("/livez").status_code == 200


@contextlib.contextmanager
def connected(api: Api) -> Iterator[socket.socket]:
    host, port = api.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        yield raw


def send_until_refused(api: Api, head: bytes, part: bytes, *, most: int) -> tuple[int, bytes]:
    """Sends `head`, then `part` over and over up to `most` bytes. (bytes that were taken, the answer)"""
    num_sent, answer = len(head), b""
    with connected(api) as raw:
        raw.sendall(head)
        try:
            while num_sent < most:
                raw.sendall(part)
                num_sent += len(part)
        except OSError:
            pass  # hung up on
        with contextlib.suppress(OSError):
            answer = raw.recv(10_000)
    return num_sent, answer


@pytest.mark.parametrize(
    ("head", "part"),
    [
        (b"GET /", b"a" * 4096),
        (b"GET /livez?q=", b"a" * 4096),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: ", b"a" * 4096),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\n", b"X-Many: " + b"a" * 2000 + b"\r\n"),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nX", b"a" * 4096),
        (b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"a" * 4096),
        (b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-Trailer: ", b"a" * 4096),
        (b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n" * 500),
    ],
)
def test_what_is_not_body_ends_within_a_few_times_its_limit(api: Api, head: bytes, part: bytes) -> None:
    before = psutil.Process(os.getpid()).memory_info().rss
    num_sent, answer = send_until_refused(api, head, part, most=64 * MIB)
    # What the kernel's buffers took after the last byte was read counts here as sent.
    assert num_sent < 32 * MIB
    assert not answer or answer.split(b" ")[1] in (b"400", b"401", b"431"), answer[:200]
    assert psutil.Process(os.getpid()).memory_info().rss - before < 32 * MIB


def test_a_long_head_is_answered_with_what_is_wrong(api: Api) -> None:
    with connected(api) as raw:
        raw.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * (70 << 10))
        answer = raw.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert b'"code":"too_large"' in answer


def test_heads_up_to_the_limit_and_many_requests_on_a_connection_are_served(api: Api) -> None:
    response = api.anonymous.get("/livez", params={"q": "a" * (60 << 10)})
    assert response.status_code == 200
    tenant = api.as_tenant()
    for _ in range(40):
        assert tenant.post("/v1/jobs", json={"prompt": "a" * 900, "stop": ["x" * 100]}).status_code == 201
    with connected(api) as raw:
        raw.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        answer = b""
        while answer.count(b'{"live":true}') < 3:
            answer += raw.recv(10_000)


def test_a_body_of_tiny_chunks_is_taken(api: Api) -> None:
    body = b'{"prompt": "' + b"a" * 800 + b'"}'
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: {api.headers()['authorization']}\r\n"
    with connected(api) as raw:
        raw.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        raw.sendall(b"".join(b"1\r\n" + bytes([byte]) + b"\r\n" for byte in body) + b"0\r\n\r\n")
        assert raw.recv(10_000).startswith(b"HTTP/1.1 201")


def test_a_head_that_does_not_come_to_its_end_is_hung_up_on(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    with connected(api) as raw:
        started = time.monotonic()
        raw.sendall(b"GET /livez HTTP/1.1\r\n")
        stop = threading.Event()

        def trickle() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.05):
                    raw.sendall(b"a: b\r\n")

        thread = threading.Thread(target=trickle)
        thread.start()
        with contextlib.suppress(ConnectionResetError):
            assert raw.recv(1000) == b""
        stop.set()
        thread.join()
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/batches?limit=" + "9" * 50_000, "limit"),
        ("/v1/batches?limit=1e999", "limit"),
        ("/v1/batches?limit=-0x1", "limit"),
        ("/v1/batches?before=" + "batch_" + "0" * 50_000, "before"),
        ("/v1/batches?" + "&".join(f"p{i}=1" for i in range(5_000)), "p0"),
        ("/v1/audit?before=" + "9" * 5_000, "before"),
        ("/v1/audit?before=0", "before"),
        ("/v1/keys?before=" + "mk_" + "0" * 5_000, "before"),
        ("/v1/adapters?after=" + "a" * 5_000, "after"),
        ("/v1/limits?colour=red", "colour"),
    ],
)
def test_a_parameter_out_of_its_bounds_is_refused_by_name(api: Api, path: str, field: str) -> None:
    response = api.as_tenant().get(path)
    assert response.status_code == 400, response.text[:300]
    assert field in fields_of(response)
    assert len(response.content) < 400_000


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/jobs/{}"),
        ("GET", "/v1/batches/{}"),
        ("GET", "/v1/sweeps/{}"),
        ("GET", "/v1/sweeps/{}/report"),
        ("GET", "/v1/adapters/{}"),
        ("DELETE", "/v1/adapters/{}"),
        ("GET", "/v1/keys/{}"),
        ("DELETE", "/v1/keys/{}"),
        ("POST", "/v1/keys/{}/rotate"),
    ],
)
def test_an_id_of_any_length_and_letters_is_nothing(api: Api, method: str, path: str) -> None:
    for strange in ("a" * 30_000, "%00", "%ff%fe", "%ed%a0%80", "mk_%D9%A1", "job_" + "0" * 32, "..%2f..", "'"):
        response = api.as_tenant().request(method, path.format(strange))
        assert response.status_code == 404, (strange[:20], response.text[:200])
        assert len(response.content) < 2_000


def test_headers_of_any_length_and_letters_are_refused_or_passed_over(api: Api) -> None:
    for name, value, status in (
        ("Idempotency-Key", "k" * 60_000, 400),
        ("Idempotency-Key", "\xe9", 400),
        ("Idempotency-Key", "", 400),
        ("Authorization", "Bearer " + "k" * 60_000, 401),
        ("Content-Type", "application/" + "x" * 60_000, 201),
        ("Accept", "a" * 60_000, 201),
        ("X-Forwarded-For", "a" * 60_000, 201),
    ):
        headers = [*api.headers().items(), (name, value)] if name != "Authorization" else [(name, value)]
        raw = [(key.encode(), text.encode("latin-1")) for key, text in headers]
        response = api.anonymous.post("/v1/jobs", content=b'{"prompt": "a"}', headers=raw)
        assert response.status_code == status, (name, response.text[:200])


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 900_000,
        b'{"prompt": ' + b"[" * 500_000 + b"]" * 400_000 + b"}",
        b'{"name": ' * 90_000,
        b'{"name": "a", "scopes": ' + b'["read",' * 100_000 + b"]}",
        b'{"name": "a", "expires_at": ' + b"9" * 900_000 + b"}",
        b'{"name": "a", "old_lives_s": 1e' + b"9" * 9_000 + b"}",
        b'{"name": "' + b"a" * 900_000 + b'"}',
        b"\x00" * 900_000,
        b"\xff\xfe{",
    ],
)
def test_json_of_any_depth_and_size_is_a_400_with_a_short_answer(api: Api, body: bytes) -> None:
    for path in ("/v1/jobs", "/v1/batches", "/v1/sweeps", "/v1/keys"):
        response = api.as_tenant().post(path, content=body)
        assert response.status_code == 400, (path, response.text[:200])
        assert len(response.content) < 200_000
