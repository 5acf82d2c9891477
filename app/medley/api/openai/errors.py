"""Refusals in OpenAI's JSON shape, from which their client makes its exceptions.

Knows statuses, codes and faults; which failure has which is `medley.api.errors`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from medley.spec.errors import Fault

PREFIX = "/openai/"
NO_RETRY = {"x-should-retry": "false"}  # their client would send 408, 409, 429 and 5xx again
MAX_LISTED = 20  # faults that the message holds, which is all that their client prints

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class OpenAIError(msgspec.Struct, omit_defaults=True):
    message: str
    type: str
    param: str | None
    code: str | None
    faults: Sequence[Fault] = ()


class OpenAIErrorBody(msgspec.Struct):
    """Every answer that is no 2xx."""

    error: OpenAIError


def error_of(status: int, code: str, message: str, faults: Sequence[Fault] = ()) -> OpenAIError:
    """What `error` holds. The message names the faults, `param` the field of the first."""
    if faults:
        left = len(faults) - MAX_LISTED
        message += ": " + "; ".join(map(str, faults[:MAX_LISTED])) + (f"; and {left} more" if left > 0 else "")
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return OpenAIError(message, kind, faults[0].field if faults else None, code, faults)


def error_body(status: int, code: str, message: str, faults: Sequence[Fault] = ()) -> bytes:
    """The JSON of a refusal."""
    return msgspec.json.encode(OpenAIErrorBody(error_of(status, code, message, faults)))


def error_headers(status: int) -> dict[str, str]:
    """The headers of a refusal: whether to try again, where the status alone misleads their client."""
    return NO_RETRY if status == 409 else {}
