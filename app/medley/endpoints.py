"""Where a tenant's webhook may lead, and one POST there: never into the operator's own network. And his own hooks'.

A URL is judged when it is registered, its addresses each time something is sent: the name is resolved once, every
address that it has is checked, and the connection goes to a checked address itself, so that a second answer of the
name server changes nothing. No redirects, no proxy of the environment; of the answer only the status is read.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import httpx

MAX_URL_CHARS = 2_000
CONNECT_S = 5.0
TOTAL_S = 15.0  # of one attempt, from the connection to the status line

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
# Addresses of the old internet inside those of the new: what they lead to is judged.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Of no use on the public internet, though `is_global` may say so: addresses of a site, of protocols, of documents.
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("fec0::/10", "3fff::/20", "192.0.0.0/24", "192.88.99.0/24")))
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa")


class NotAllowed(Exception):
    """The URL or an address of its host is none to send to; the text says why."""


@dataclass(frozen=True)
class Answer:
    """How an attempt went: an HTTP status, or why there is none."""

    status: int | None
    error: str | None


def judge_url(url: str, *, allow_loopback: bool) -> SplitResult:
    """The parts of a URL that may be registered. Raises NotAllowed. Resolves no name."""
    if len(url) > MAX_URL_CHARS or not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise NotAllowed(f"a URL of at most {MAX_URL_CHARS} printable ASCII characters")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise NotAllowed("a URL as https://host/path") from error
    if parts.scheme != "https" and not (allow_loopback and parts.scheme == "http"):
        raise NotAllowed("a URL that begins with https://")
    if not host or port == 0:
        raise NotAllowed("a URL with a host")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise NotAllowed("a URL without a user, a password or a fragment")
    literal = _literal(host)
    if literal is not None:
        judge_address(literal, allow_loopback=allow_loopback)
        _judge_scheme(parts, is_loopback=_embedded(literal).is_loopback)
    else:
        name = "." + host.rstrip(".")
        if name.endswith(_LOCAL_SUFFIXES) and not allow_loopback:
            raise NotAllowed("a host on the public internet")
        _judge_scheme(parts, is_loopback=name.endswith(".localhost"))
    return parts


def judge_address(address: Address, *, allow_loopback: bool) -> None:
    """Raises NotAllowed for an address that is private, loopback, link-local, of metadata, or otherwise not public."""
    inner = _embedded(address)
    if allow_loopback and inner.is_loopback:
        return
    # is_global is false of every range that IANA lists as special, the metadata services' link-local among them.
    is_public = inner.is_global and not (inner.is_multicast or inner.is_reserved or inner.is_unspecified)
    if not is_public or any(inner in network for network in _NOT_PUBLIC):
        raise NotAllowed("a host on the public internet")


def _judge_scheme(parts: SplitResult, *, is_loopback: bool) -> None:
    """Raises NotAllowed for what would leave this machine without TLS."""
    if parts.scheme != "https" and not is_loopback:
        raise NotAllowed("a URL that begins with https://, as its host is not this machine")


def resolve(host: str, port: int, *, allow_loopback: bool) -> Address:
    """An address of `host` that may be sent to; all that it has must be. Raises NotAllowed, or OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in found]
    for address in addresses:
        judge_address(address, allow_loopback=allow_loopback)
    if not addresses:
        raise OSError("the host has no address")
    # An old address works from everywhere; a new one only where the operator has a route.
    return min(addresses, key=lambda address: address.version)


def post(url: str, body: str, headers: Mapping[str, str], *, allow_loopback: bool) -> Answer:
    """One POST of JSON within about `TOTAL_S` seconds. Raises nothing of the network's."""
    try:
        parts = judge_url(url, allow_loopback=allow_loopback)
        assert parts.hostname is not None
        port = parts.port or (443 if parts.scheme == "https" else 80)
        address = resolve(parts.hostname, port, allow_loopback=allow_loopback)
        _judge_scheme(parts, is_loopback=_embedded(address).is_loopback)
    except NotAllowed as error:
        return Answer(None, f"not sent: wanted {error}")
    except (OSError, UnicodeError) as error:
        return Answer(None, f"the host is not found: {type(error).__name__}")
    return _answer(parts, port, address, body, headers, TOTAL_S)


def post_trusted(url: str, body: str, headers: Mapping[str, str], *, timeout_s: float) -> Answer:
    """One POST of JSON to where the operator's own configuration leads, which may be his own network."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        address = ipaddress.ip_address(str(found[0][4][0]).partition("%")[0])
    except (OSError, UnicodeError) as error:
        return Answer(None, f"the host is not found: {type(error).__name__}")
    return _answer(parts, port, address, body, headers, timeout_s)


def _answer(
    parts: SplitResult, port: int, address: Address, body: str, headers: Mapping[str, str], total_s: float
) -> Answer:
    try:
        status = asyncio.run(_post(parts, port, address, body, headers, total_s))
    except TimeoutError:
        return Answer(None, f"no answer within {total_s:g} s")
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ssl.SSLError) as error:
        return Answer(None, f"no answer: {type(error).__name__}")
    return Answer(status, None if 200 <= status < 300 else f"answered {status}")


async def _post(
    parts: SplitResult, port: int, address: Address, body: str, headers: Mapping[str, str], total_s: float
) -> int:
    assert parts.hostname is not None
    literal = f"[{address}]" if address.version == 6 else str(address)
    target = f"{parts.scheme}://{literal}:{port}{parts.path or '/'}" + (f"?{parts.query}" if parts.query else "")
    # The certificate must be the host's, though the connection goes to the address.
    extensions = {"sni_hostname": parts.hostname} if parts.scheme == "https" else {}
    timeout = httpx.Timeout(total_s, connect=min(CONNECT_S, total_s))
    # Every wait of httpx's begins anew with each byte; only the whole bounds an endpoint that trickles.
    client = httpx.AsyncClient(verify=_tls(), trust_env=False, timeout=timeout)
    async with asyncio.timeout(total_s), client:
        request = client.build_request(
            "POST",
            target,
            content=body.encode(),
            headers={**headers, "Host": parts.netloc, "Content-Type": "application/json", "User-Agent": "medley"},
            extensions=extensions,
        )
        response = await client.send(request, stream=True, follow_redirects=False)
        await response.aclose()
        return response.status_code


@functools.cache
def _tls() -> ssl.SSLContext:
    """Made once: it reads every root certificate."""
    return httpx.create_ssl_context(trust_env=False)


def _literal(host: str) -> Address | None:
    """The address that a host in a URL is, as lenient as the system's resolver: 127.1 and 0x7f.1 are addresses too."""
    try:
        return ipaddress.ip_address(host.partition("%")[0].rstrip("."))
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def _embedded(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
