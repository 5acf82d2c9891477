"""Where a webhook may lead: never into a private network, whatever its URL and its name server say."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

import pytest
import standardwebhooks

from medley import endpoints
from medley.endpoints import NotAllowed, judge_address, judge_url, post, resolve
from medley.spec.webhooks import BadSignature, new_secret, read_secret, shown_secret, sign, verify

PRIVATE = [
    "127.0.0.1",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "198.18.0.1",
    "::1",
    "::",
    "fe80::1",
    "fd00:ec2::254",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "2001:db8::1",
    "fec0::1",
    "192.0.0.8",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    with pytest.raises(NotAllowed):
        judge_address(ipaddress.ip_address(address), allow_loopback=False)
    host = f"[{address}]" if ":" in address else address
    with pytest.raises(NotAllowed):
        judge_url(f"https://{host}/hook", allow_loopback=False)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_a_public_address_is_not(address: str) -> None:
    judge_address(ipaddress.ip_address(address), allow_loopback=False)


@pytest.mark.parametrize("address", PRIVATE)
def test_only_loopback_is_allowed_by_the_operator(address: str) -> None:
    checked = ipaddress.ip_address(address)
    if address in ("127.0.0.1", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"):
        judge_address(checked, allow_loopback=True)
    else:
        with pytest.raises(NotAllowed):
            judge_address(checked, allow_loopback=True)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "ftp://example.com/",
        "https://",
        "https:///x",
        "example.com",
        "https://user@example.com/",
        "https://user:pw@example.com/",
        "https://example.com/#x",
        "https://example.com:0/",
        "https://example.com:99999/",
        "https://exa mple.com/",
        "https://example.com\\@127.0.0.1/",
        "https://ex\u00e4mple.com/",
        "https://example.com/\r\nX: y",
        "https://localhost/",
        "https://LOCALHOST./",
        "https://metadata.google.internal/",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f.1/",
        "https://017700000001/",
        "https://[::1]/",
        "https://[/",
        "https://example.com/" + "x" * 2_000,
    ],
)
def test_a_url_that_leads_elsewhere_is_refused(url: str) -> None:
    with pytest.raises(NotAllowed):
        judge_url(url, allow_loopback=False)


def test_a_public_url_is_not() -> None:
    assert judge_url("https://example.com:8443/a?b=c", allow_loopback=False).port == 8443


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    asked: list[str] = []

    def getaddrinfo(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(endpoints.socket, "getaddrinfo", getaddrinfo)
    return asked


def test_without_tls_nothing_leaves_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    judge_url("http://127.0.0.1:8080/hook", allow_loopback=True)
    with pytest.raises(NotAllowed, match="https"):
        judge_url("http://1.1.1.1/hook", allow_loopback=True)
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: found)
    with pytest.raises(NotAllowed, match="https"):
        judge_url("http://example.com/hook", allow_loopback=True)
    judge_url("http://localhost:8080/hook", allow_loopback=True)
    answer = post("http://example.com/hook", "{}", {}, allow_loopback=True)
    assert (answer.status, "https" in (answer.error or "")) == (None, True)


def test_every_address_of_a_host_must_be_public(monkeypatch: pytest.MonkeyPatch) -> None:
    resolving(monkeypatch, "93.184.216.34", "10.0.0.1")
    with pytest.raises(NotAllowed):
        resolve("example.com", 443, allow_loopback=False)
    asked = resolving(monkeypatch, "2606:4700::1", "93.184.216.34")
    assert str(resolve("example.com", 443, allow_loopback=False)) == "93.184.216.34"
    assert asked == ["example.com"]


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second answer of the name server is never asked for."""
    asked = resolving(monkeypatch, "93.184.216.34")
    sent: list[Any] = []

    async def fake(parts: Any, port: int, address: Any, *_: Any) -> int:
        sent.append((parts.hostname, port, str(address)))
        return 204

    monkeypatch.setattr(endpoints, "_post", fake)
    assert post("https://example.com/x", "{}", {}, allow_loopback=False).error is None
    assert (sent, asked) == ([("example.com", 443, "93.184.216.34")], ["example.com"])
    resolving(monkeypatch, "127.0.0.1")
    assert post("https://example.com/x", "{}", {}, allow_loopback=False).error == (
        "not sent: wanted a host on the public internet"
    )
    assert len(sent) == 1


def test_what_does_not_answer_is_said_without_more(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}/"
        assert post(url, "{}", {}, allow_loopback=True).error == "no answer: ConnectError"

    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(endpoints.socket, "getaddrinfo", getaddrinfo)
    assert post("https://nowhere.example/", "{}", {}, allow_loopback=False).error == "the host is not found: gaierror"


def test_signatures_are_those_of_standard_webhooks() -> None:
    import datetime
    import time

    key, other = new_secret(), new_secret()
    now, payload = int(time.time()), '{"a": "\u2603"}'
    judge = standardwebhooks.Webhook(shown_secret(key))
    at = datetime.datetime.fromtimestamp(now, tz=datetime.UTC)
    assert sign("msg_1", now, payload, [key]) == judge.sign("msg_1", at, payload)
    headers = {
        "Webhook-Id": "msg_1",
        "Webhook-Timestamp": str(now),
        "Webhook-Signature": sign("msg_1", now, payload, [other, key]),
    }
    verify(payload.encode(), headers, shown_secret(key))
    verify(payload, headers, shown_secret(other))
    assert read_secret(shown_secret(key)) == key
    for wrong in (
        {**headers, "Webhook-Timestamp": str(now - 3_600)},
        {**headers, "Webhook-Id": "msg_2"},
        {"Webhook-Id": "msg_1"},
    ):
        with pytest.raises(BadSignature):
            verify(payload, wrong, shown_secret(key))
    with pytest.raises(ValueError, match="wanted whsec_"):
        read_secret("whsec_?")
