"""Answers other than 2xx: the tree of refusals, and the JSON shape they have; under /openai/ it is OpenAI's.

    ApiError
      InvalidRequest  400  all faults of the request at once
      Unauthorized    401
      Forbidden       403  the key lacks a scope
      Closing         403  the tenant is to be deleted
      NotFound        404  another tenant's things too
      MethodNotAllowed  405
      Conflict        409
      TooLarge        413
      Encoded         415  a compressed body
      RateLimited     429  too many requests a second
      OverQuota       429  more than the tenant may have
      NotReady        503  try again later

Knows nothing of resources.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute, iter_route_contexts
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from medley.api.openai import errors as openai
from medley.db.batches import TenantClosing
from medley.db.connections import is_tenant_gone
from medley.db.idempotency import KeyConflict
from medley.db.quotas import QuotaExceeded
from medley.objects import StoreUnavailable
from medley.spec.errors import Fault
from medley.spec.scopes import Scope

MAX_FAULTS = 1_000  # listed in one answer; the message says how many more there are
MAX_FAULTS_LOOKED_FOR = 20_000  # then the rest is not judged
RETRY_AFTER_S = 1

log = structlog.get_logger()


class ApiError(Exception):
    """A refusal that the caller sees as it is."""

    status = 500
    code = "internal"

    def __init__(self, message: str, faults: Iterable[Fault] = (), headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message, self.faults, self.headers = message, tuple(faults), headers or {}


class InvalidRequest(ApiError):
    status, code = 400, "invalid_request"

    @classmethod
    def of(cls, faults: FaultList | Iterable[Fault]) -> InvalidRequest:
        """The refusal that lists these."""
        found = faults if isinstance(faults, FaultList) else FaultList(faults)
        at_least = "at least " if found.num_found >= MAX_FAULTS_LOOKED_FOR else ""
        message = f"{at_least}{found.num_found} fault{'s' * (found.num_found != 1)} in the request; nothing was done"
        if found.num_found > len(found.listed):
            message += f"; the first {len(found.listed)} are listed, {found.num_found - len(found.listed)} more are not"
        return cls(message, found.listed)


class Unauthorized(ApiError):
    status, code = 401, "unauthorized"

    def __init__(self) -> None:
        message = "a valid API key is wanted: Authorization: Bearer mk_..."
        super().__init__(message, headers={"WWW-Authenticate": 'Bearer realm="medley"'})


class Forbidden(ApiError):
    status, code = 403, "wrong_scope"

    def __init__(self, key: str, wanted: Scope, held: Iterable[str]) -> None:
        scopes = ", ".join(scope.value for scope in Scope if scope in held)
        super().__init__(f"this wants a key with the scope {wanted.value}; {key} has {scopes}")


class Closing(ApiError):
    status, code = 403, "tenant_closing"

    def __init__(self) -> None:
        super().__init__("this tenant is to be deleted and takes no new work; the operator can call the deletion off")


class NotFound(ApiError):
    status, code = 404, "not_found"

    def __init__(self, kind: str, shown_id: str) -> None:
        super().__init__(f"there is no {kind} {shown_id[:200]!r}")


class MethodNotAllowed(ApiError):
    status, code = 405, "method_not_allowed"

    def __init__(self, method: str, path: str, served: Iterable[str]) -> None:
        allowed = ", ".join(served)
        super().__init__(f"{path[:200]} is not served by {method}, but by {allowed}", headers={"Allow": allowed})


class Conflict(ApiError):
    status, code = 409, "conflict"


class TooLarge(ApiError):
    status, code = 413, "too_large"

    def __init__(self, message: str, faults: Iterable[Fault] = ()) -> None:
        # The rest of the body is not read, so the connection cannot be used again.
        super().__init__(message, faults, {"Connection": "close"})


class RateLimited(ApiError):
    status, code = 429, "rate_limited"

    def __init__(self, per_s: float, window_s: int, again_s: int) -> None:
        message = f"more than {per_s:g} requests a second over {window_s} s, the limit of this tenant; send fewer"
        super().__init__(message, headers={"Retry-After": str(again_s)})


class OverQuota(ApiError):
    status, code = 429, "quota_exceeded"

    def __init__(self, error: QuotaExceeded) -> None:
        advice = _ADVICE[error.quota]
        if error.asked > error.limit:
            advice = "it would not fit if nothing else were there: send less at once"
        message = (
            f"the limit {error.quota} of this tenant is {error.limit}; {error.used} are used and {error.asked} more"
            f" were asked for. Nothing was done: {advice}, or ask the operator for more"
        )
        super().__init__(message, headers={"Retry-After": str(_QUOTA_RETRY_AFTER_S[error.quota])})


# What ends by itself is soon worth another try; what is stored stays.
_QUOTA_RETRY_AFTER_S = {"queued_jobs": 10, "queued_bytes": 10, "adapters": 3600, "storage_bytes": 3600}
_ADVICE = {
    "queued_jobs": "wait until jobs have ended, or cancel some",
    "queued_bytes": "wait until batches have finished, or cancel some",
    "adapters": "delete adapters",
    "storage_bytes": "store fewer or smaller adapters and files",
}


class Encoded(ApiError):
    status, code = 415, "unsupported_encoding"

    def __init__(self) -> None:
        super().__init__("compressed bodies are not read here; send the body as it is", headers={"Connection": "close"})


class NotReady(ApiError):
    status, code = 503, "not_ready"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"Retry-After": str(RETRY_AFTER_S)})


class FaultList:
    """Faults as they are found: all are counted, the first `MAX_FAULTS` kept.

    Raises InvalidRequest by itself at `MAX_FAULTS_LOOKED_FOR`: a request of nothing but faults must not be gone
    through to its end.
    """

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self.listed: list[Fault] = []
        self.num_found = 0
        self.extend(faults)

    def __bool__(self) -> bool:
        return self.num_found > 0

    def add(self, fault: Fault) -> None:
        self.num_found += 1
        if len(self.listed) < MAX_FAULTS:
            self.listed.append(fault)
        if self.num_found >= MAX_FAULTS_LOOKED_FOR:
            self.raise_any()

    def extend(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self.add(fault)

    def raise_any(self) -> None:
        """Raises InvalidRequest where there is a fault."""
        if self:
            raise InvalidRequest.of(self)


class ErrorDetail(msgspec.Struct):
    code: str
    message: str
    faults: tuple[Fault, ...] = ()


class ErrorBody(msgspec.Struct):
    """Every answer that is no 2xx."""

    error: ErrorDetail


def error_response(error: ApiError, path: str) -> Response:
    """The answer for a refusal, in the shape that callers of `path` read."""
    if path.startswith(openai.PREFIX):
        content = openai.error_body(error.status, error.code, error.message, error.faults)
        headers = openai.error_headers(error.status) | error.headers
        return Response(content, error.status, headers, media_type="application/json")
    body = ErrorBody(ErrorDetail(error.code, error.message, error.faults))
    return Response(msgspec.json.encode(body), error.status, error.headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Gives every failure of `app` its shape."""
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(KeyConflict, _key_conflict)
    app.add_exception_handler(QuotaExceeded, _over_quota)
    app.add_exception_handler(TenantClosing, _closing)
    app.add_exception_handler(DBAPIError, _database)
    app.add_exception_handler(PoolTimeout, _database)
    app.add_exception_handler(StoreUnavailable, _store)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _bug)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request.url.path)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == MethodNotAllowed.status:
        return error_response(MethodNotAllowed(request.method, path, _methods(request)), path)
    refused = ApiError(f"{request.method} {path[:200]}: {error.detail}", headers=dict(error.headers or {}))
    refused.status = error.status_code
    refused.code = "not_found" if error.status_code == NotFound.status else "invalid_request"
    return error_response(refused, path)


def _methods(request: Request) -> list[str]:
    """The methods of all routes to the path; Starlette names those of the first alone."""
    routes = (context.original_route for context in iter_route_contexts(request.app.routes))
    here = [r for r in routes if isinstance(r, APIRoute) and r.path_regex.match(request.scope["path"])]
    return sorted({method for route in here for method in route.methods or ()})


async def _gone(request: Request, _error: Exception) -> Response:
    # The body was cut, so nobody reads this; without it a log would speak of a bug.
    return error_response(InvalidRequest("the request was cut"), request.url.path)


async def _key_conflict(request: Request, error: Exception) -> Response:
    refused = Conflict(f"the idempotency key {str(error)[:200]!r} was used with another request")
    refused.code = "idempotency_conflict"
    return error_response(refused, request.url.path)


async def _over_quota(request: Request, error: Exception) -> Response:
    assert isinstance(error, QuotaExceeded)
    return error_response(OverQuota(error), request.url.path)


async def _closing(request: Request, _error: Exception) -> Response:
    return error_response(Closing(), request.url.path)


async def _database(request: Request, error: Exception) -> Response:
    """A database that is away or too busy is the caller's to try again; any other fault of SQL is our bug.

    But for a tenant whose row went after its key was looked up: such a key opens nothing.
    """
    if isinstance(error, IntegrityError) and is_tenant_gone(error):
        return error_response(Unauthorized(), request.url.path)
    if not isinstance(error, OperationalError | PoolTimeout):
        return await _bug(request, error)
    log.warning("database.unavailable", path=request.url.path, error=type(error).__name__)
    return error_response(NotReady("the database does not answer in time; try again"), request.url.path)


async def _store(request: Request, error: Exception) -> Response:
    log.warning("store.unavailable", path=request.url.path, reason=str(error))
    return error_response(NotReady("the store does not answer in time; try again"), request.url.path)


async def _bug(request: Request, error: Exception) -> Response:
    origin = type(getattr(error, "orig", error)).__name__
    log.error("request.failed", method=request.method, path=request.url.path, error=origin, exc_info=error)
    return error_response(ApiError("an internal error; it was logged"), request.url.path)
