"""What the client raises.

MedleyError
├── Connection       the service could not be reached, after retries
├── Timeout          a wait ran out; the job goes on
├── JobEnded         a job ended without a result: failed, cancelled or expired
└── APIError         the service refused a request
    ├── InvalidRequest    its faults are in `.faults`, all of them
    ├── Authentication    no key, or one that is unknown, expired or revoked
    ├── Forbidden         the key lacks the scope that this wants
    ├── NotFound          no such thing, or another tenant's
    ├── Conflict          a name or an idempotency key is taken by something else
    ├── TooLarge          a body, a prompt or a count over its limit
    └── OverLimit         more than the tenant may have, or more requests a second than it may send
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from medley.spec.errors import Fault

if TYPE_CHECKING:
    from medley.client.types import JobStatus


class MedleyError(Exception):
    """The root of the tree."""


class Connection(MedleyError):
    """The service could not be reached, after retries."""


class Timeout(MedleyError):
    """A wait ran out; the job goes on."""


class JobEnded(MedleyError):
    """A job ended without a result; `.status` tells how."""

    def __init__(self, status: JobStatus) -> None:
        why = f": {status.error.code}: {status.error.message}" if status.error else ""
        super().__init__(f"job {status.id} {status.state}{why}")
        self.status = status


class APIError(MedleyError):
    """The service refused a request. `status` is the HTTP status, `faults` all that was wrong with the request."""

    def __init__(self, status: int, code: str, message: str, faults: Sequence[Fault] = ()) -> None:
        lines = "".join(f"\n  {fault}" for fault in faults[:20])
        more = f"\n  and {len(faults) - 20} more" if len(faults) > 20 else ""
        super().__init__(f"{message} ({status} {code}){lines}{more}")
        self.status = status
        self.code = code
        self.message = message
        self.faults = tuple(faults)


class InvalidRequest(APIError):
    """The request has faults."""


class Authentication(APIError):
    """No key, or one that is unknown, expired or revoked."""


class Forbidden(APIError):
    """The key lacks the scope that this wants; the message names it."""


class NotFound(APIError):
    """No such thing, or another tenant's."""


class Conflict(APIError):
    """A name or an idempotency key is taken by something else."""


class TooLarge(APIError):
    """A body, a prompt or a count over its limit."""


class OverLimit(APIError):
    """More than the tenant may have, or (after retries) more requests a second than it may send."""


BY_STATUS: dict[int, type[APIError]] = {
    400: InvalidRequest,
    401: Authentication,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    429: OverLimit,
}
