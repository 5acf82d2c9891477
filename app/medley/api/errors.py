"""Answers other than 2xx: the tree of refusals, and the one JSON shape they all have.

    ApiError
      InvalidRequest  400  all faults of the request at once
      Unauthorized    401
      NotFound        404  another tenant's things too
      Conflict        409
      TooLarge        413
      NotReady        503  try again later

Knows nothing of resources.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import structlog
from fastapi import FastAPI, Request, Response
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from medley.db.idempotency import KeyConflict
from medley.spec.errors import Fault

MAX_FAULTS = 1_000  # listed in one answer; the message says how many more there are
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
        message = f"{found.num_found} fault{'s' * (found.num_found != 1)} in the request; nothing was done"
        if found.num_found > len(found.listed):
            message += f"; the first {len(found.listed)} are listed, {found.num_found - len(found.listed)} more are not"
        return cls(message, found.listed)


class Unauthorized(ApiError):
    status, code = 401, "unauthorized"

    def __init__(self) -> None:
        message = "a valid API key is wanted: Authorization: Bearer mk_..."
        super().__init__(message, headers={"WWW-Authenticate": 'Bearer realm="medley"'})


class NotFound(ApiError):
    status, code = 404, "not_found"

    def __init__(self, kind: str, shown_id: str) -> None:
        super().__init__(f"there is no {kind} {shown_id[:200]!r}")


class Conflict(ApiError):
    status, code = 409, "conflict"


class TooLarge(ApiError):
    status, code = 413, "too_large"

    def __init__(self, message: str, faults: Iterable[Fault] = ()) -> None:
        # The rest of the body is not read, so the connection cannot be used again.
        super().__init__(message, faults, {"Connection": "close"})


class NotReady(ApiError):
    status, code = 503, "not_ready"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"Retry-After": str(RETRY_AFTER_S)})


class FaultList:
    """Faults as they are found: all are counted, the first `MAX_FAULTS` kept."""

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

    def extend(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self.add(fault)

    def raise_any(self) -> None:
        """Raises InvalidRequest where there is a fault."""
        if self:
            raise InvalidRequest.of(self)


class _Error(msgspec.Struct):
    code: str
    message: str
    faults: tuple[Fault, ...] = ()


class _Body(msgspec.Struct):
    error: _Error


def error_response(error: ApiError) -> Response:
    """The answer for a refusal."""
    body = _Body(_Error(error.code, error.message, error.faults))
    return Response(msgspec.json.encode(body), error.status, error.headers, media_type="application/json")


def install(app: FastAPI) -> None:
    """Gives every failure of `app` the one shape."""
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(KeyConflict, _key_conflict)
    app.add_exception_handler(DBAPIError, _database)
    app.add_exception_handler(PoolTimeout, _database)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _bug)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refused = ApiError(f"{request.method} {request.url.path[:200]}: {error.detail}", headers=dict(error.headers or {}))
    refused.status = error.status_code
    refused.code = "not_found" if error.status_code in (404, 405) else "invalid_request"
    return error_response(refused)


async def _gone(_: Request, _error: Exception) -> Response:
    # The body was cut, so nobody reads this; without it a log would speak of a bug.
    return error_response(InvalidRequest("the request was cut"))


async def _key_conflict(_: Request, error: Exception) -> Response:
    refused = Conflict(f"the idempotency key {str(error)[:200]!r} was used with another request")
    refused.code = "idempotency_conflict"
    return error_response(refused)


async def _database(request: Request, error: Exception) -> Response:
    """A database that is away or too busy is the caller's to try again; any other fault of SQL is our bug."""
    if not isinstance(error, OperationalError | PoolTimeout):
        return await _bug(request, error)
    log.warning("database.unavailable", path=request.url.path, error=type(error).__name__)
    return error_response(NotReady("the database does not answer in time; try again"))


async def _bug(request: Request, error: Exception) -> Response:
    # An SQL error prints its parameters, which hold prompts: the class and the place must do.
    detail = {} if isinstance(error, DBAPIError) else {"exc_info": error}
    origin = type(getattr(error, "orig", error)).__name__
    log.error("request.failed", method=request.method, path=request.url.path, error=origin, **detail)
    return error_response(ApiError("an internal error; it was logged"))
