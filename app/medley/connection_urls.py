"""URLs of PostgreSQL and Redis: put together from their parts, and judged before anything connects.

A connection that leaves this machine is encrypted, and one that is not over a private socket has a password that is
no default, unless the operator says otherwise by name. Knows no environment; it never puts a value into a text.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

SSL_MODES = frozenset({"disable", "require", "verify-ca", "verify-full"})
_ENCRYPTED_MODES = SSL_MODES - {"disable"}
# What examples and images ship with.
_DEFAULT_PASSWORDS = frozenset(
    {"admin", "changeme", "change-me", "change_me", "default", "example", "guest", "hunter2", "letmein", "medley"}
    | {"pass", "passw0rd", "password", "postgres", "redis", "root", "secret", "test"}
    | {"1234", "12345", "123456", "12345678", "123456789"}
)


def with_password(url: str, password: str | None) -> str:
    """`url` with `password`. Raises ValueError where it holds one already."""
    if password is None:
        return url
    parts = urlsplit(url)
    if parts.password is not None:
        raise ValueError("a password stands in the URL and beside it")
    user, at, host = parts.netloc.rpartition("@")
    user = user if at else ""
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))


def with_query(url: str, fields: Mapping[str, str | None]) -> str:
    """`url` with these query parameters set; None leaves one as it is."""
    given = {name: value for name, value in fields.items() if value is not None}
    if not given:
        return url
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query)) | given
    return urlunsplit(parts._replace(query=urlencode(query, safe="/")))


def is_default(password: str) -> bool:
    """Whether it is empty or one that everybody tries first."""
    return not password.strip() or password.lower() in _DEFAULT_PASSWORDS


def password_weakness(url: str) -> str | None:
    """What is wanted instead of the URL's password, or None. Private sockets need none."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    if not _hosts(url):
        return None
    if parts.password is None and not {"sslcert", "passfile", "ssl_certfile"}.isdisjoint(query):
        return None
    password = unquote(parts.password or "")
    if is_default(password) or password == unquote(parts.username or ""):
        return "a password that is neither empty nor a default one"
    return None


def encryption_weakness(url: str, plaintext_hosts: Collection[str]) -> str | None:
    """What is wanted of a connection that others could read, or None. Hosts in `plaintext_hosts` are excused."""
    exposed = [host for host in _hosts(url) if not is_loopback(host) and host not in plaintext_hosts]
    if not exposed or _is_encrypted(url):
        return None
    wanted = (
        "rediss:// with a verified certificate" if urlsplit(url).scheme.startswith("redis") else "sslmode=verify-full"
    )
    return f"{wanted}, or the host in MEDLEY_PLAINTEXT_HOSTS where the network itself is trusted"


def _is_encrypted(url: str) -> bool:
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    if parts.scheme == "rediss":
        return query.get("ssl_cert_reqs", "required").lower() in ("required", "cert_required")
    return parts.scheme.startswith("postgresql") and query.get("sslmode") in _ENCRYPTED_MODES


def _hosts(url: str) -> list[str]:
    """The hosts that the URL reaches over TCP."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return []
    # libpq takes hosts in the query too, several with commas; one that begins with a slash is a socket's folder.
    query = dict(parse_qsl(parts.query))
    named = ",".join([parts.hostname or "", query.get("host", ""), query.get("hostaddr", "")]).split(",")
    return [_without_port(host) for host in named if host and host[0] not in "/@"]


def _without_port(host: str) -> str:
    return host.partition(":")[0] if host.count(":") == 1 else host


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
