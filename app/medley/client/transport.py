"""HTTP with the service's manners: a key on each request, retries where they are safe, errors as types.

Every create carries an idempotency key, so a request whose answer was lost can be sent again. Retried are
connection failures, 429 and 502-504, with exponential backoff and full jitter, `Retry-After` respected.
Knows nothing of resources.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec

from medley.client.errors import BY_STATUS, APIError, Connection
from medley.spec.errors import Fault

T = TypeVar("T")

BACKOFF_S = 0.2  # before the first retry, doubled for each further one
BACKOFF_LIMIT_S = 10.0
RETRY_AFTER_LIMIT_S = 60.0
RETRIED = frozenset({429, 502, 503, 504})
# Faults of the URL or the key, which no retry mends.
HOPELESS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)


class Transport:
    """One connection pool to one service. Safe to use from several threads.

    timeout_s: of one request. retries: how often a request that did not get through is sent again. Raises ValueError
    for a URL or a key that cannot be one.
    """

    def __init__(self, base_url: str, api_key: str, *, timeout_s: float, retries: int) -> None:
        if not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key: got characters that no key has, wanted mk_...")
        self._retries = retries
        try:
            self._http = httpx.Client(
                base_url=base_url.rstrip("/"),
                headers={"Authorization": f"Bearer {api_key}", "User-Agent": "medley-client"},
                timeout=httpx.Timeout(timeout_s, connect=10.0),
                limits=httpx.Limits(max_connections=32, max_keepalive_connections=32),
            )
        except httpx.InvalidURL as error:
            raise ValueError(f"base_url: got {base_url!r}, wanted http(s)://host:port ({error})") from error

    def get(self, kind: type[T], path: str, params: Mapping[str, Any] | None = None) -> T:
        """GET `path`, decoded as `kind`. Raises APIError or Connection."""
        return decode(kind, self.request("GET", path, params=_present(params)))

    def post(self, kind: type[T], path: str, body: object = None, *, key: str | None = None) -> T:
        """POST `body` as JSON, under idempotency key `key`, decoded as `kind`."""
        content = b"" if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"} | ({"Idempotency-Key": key} if key else {})
        return decode(kind, self.request("POST", path, content=content, headers=headers))

    def patch(self, kind: type[T], path: str, body: object) -> T:
        """PATCH `body` as JSON, decoded as `kind`. What it sets it sets again where it is sent twice."""
        headers = {"Content-Type": "application/json"}
        return decode(kind, self.request("PATCH", path, content=msgspec.json.encode(body), headers=headers))

    def post_lines(
        self, kind: type[T], path: str, lines: Callable[[], Iterable[bytes]], *, params: Mapping[str, Any], key: str
    ) -> T:
        """POST a JSONL stream under idempotency key `key`; `lines` is called again for each try."""
        headers = {"Content-Type": "application/x-ndjson", "Idempotency-Key": key}
        response = self._retry(
            lambda: self._http.request("POST", path, content=lines(), headers=headers, params=_present(params))
        )
        return decode(kind, response)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """One request with retries. Raises APIError for a refusal, Connection where nothing answered."""
        return self._retry(lambda: self._http.request(method, path, **options))

    def close(self) -> None:
        self._http.close()

    def _retry(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        for attempt in range(self._retries + 1):
            is_last = attempt == self._retries
            try:
                response = send()
            except httpx.TransportError as error:
                if is_last or isinstance(error, HOPELESS):
                    raise Connection(f"no answer from {self._http.base_url}: {_reason(error)}") from error
                wait_s = _backoff(attempt)
            else:
                if response.is_success:
                    return response
                refusal = _refusal(response)
                # What a tenant has too much of may be there for hours: that is for the caller to know.
                if is_last or response.status_code not in RETRIED or refusal.code == "quota_exceeded":
                    raise refusal
                wait_s = _retry_after(response) or _backoff(attempt)
            time.sleep(wait_s)
        raise AssertionError("unreachable: the last attempt returns or raises")


def decode(kind: type[T], response: httpx.Response) -> T:
    """The body as `kind`. Raises APIError where something else than the service has answered."""
    try:
        return msgspec.json.decode(response.content, type=kind)
    except msgspec.DecodeError as error:
        raise APIError(response.status_code, "bad_answer", f"not an answer of the service: {error}") from error


def segment(name: str) -> str:
    """A name as one segment of a path, whatever it holds."""
    return quote(name, safe="")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _backoff(attempt: int) -> float:
    return random.uniform(0, min(BACKOFF_LIMIT_S, BACKOFF_S * 2**attempt))


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return min(RETRY_AFTER_LIMIT_S, float(value)) if value.isdigit() else None


def _present(params: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (params or {}).items() if value is not None}


class _Error(msgspec.Struct):
    code: str = "unknown"
    message: str = ""
    faults: list[Fault] = []


class _ErrorBody(msgspec.Struct):
    error: _Error


def _refusal(response: httpx.Response) -> APIError:
    try:
        error = msgspec.json.decode(response.content, type=_ErrorBody).error
    except msgspec.DecodeError:
        error = _Error(message=response.text[:200] or response.reason_phrase)
    kind = BY_STATUS.get(response.status_code, APIError)
    return kind(response.status_code, error.code, error.message, error.faults)
