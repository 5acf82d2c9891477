"""Webhooks as both sides speak of them: events, secrets, and signatures by the Standard Webhooks scheme.

A message is signed with HMAC-SHA256 over `id.timestamp.payload`; its signatures stand in one header, one a secret, so
that a receiver can change secrets without losing a message.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum

ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER = "webhook-id", "webhook-timestamp", "webhook-signature"
SECRET_PREFIX = "whsec_"
SECRET_BYTES = 32
TOLERANCE_S = 300.0  # how old a message may be before it may be another's replay


class Event(StrEnum):
    """What an endpoint can be told of."""

    BATCH_FINISHED = "batch.finished"
    BATCH_FAILING = "batch.failing"  # as many of its jobs have failed as the endpoint's failed_jobs
    SWEEP_FINISHED = "sweep.finished"
    ADAPTER_QUARANTINED = "adapter.quarantined"


PING = "ping"  # what an endpoint is sent on demand


class BadSignature(Exception):
    """The message is not one that was signed with the secret, or it is too old."""


def new_secret() -> bytes:
    return secrets.token_bytes(SECRET_BYTES)


def shown_secret(secret: bytes) -> str:
    """As tenants have it: `whsec_` and base64."""
    return SECRET_PREFIX + base64.b64encode(secret).decode()


def read_secret(text: str) -> bytes:
    """The bytes of a secret as it is shown. Raises ValueError."""
    try:
        return base64.b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError("secret: got something else, wanted whsec_ and base64") from error


def sign(message_id: str, timestamp: int, payload: str, keys: Sequence[bytes]) -> str:
    """The signature header's value, a signature for each of `keys`."""
    return " ".join(f"v1,{_signature(message_id, timestamp, payload, key)}" for key in keys)


def verify(payload: bytes | str, headers: Mapping[str, str], secret: str) -> None:
    """What a receiver does first, with the body as it came. Raises BadSignature."""
    text = payload.decode() if isinstance(payload, bytes) else payload
    lower = {name.lower(): value for name, value in headers.items()}
    try:
        message_id, sent_at = lower[ID_HEADER], int(lower[TIMESTAMP_HEADER])
        given = lower[SIGNATURE_HEADER].split()
    except (KeyError, ValueError) as error:
        raise BadSignature("the headers of a signed message are missing") from error
    if abs(time.time() - sent_at) > TOLERANCE_S:
        raise BadSignature("the message is too old, or from the future")
    wanted = f"v1,{_signature(message_id, sent_at, text, read_secret(secret))}".encode()
    if not any(hmac.compare_digest(wanted, signature.encode()) for signature in given):
        raise BadSignature("no signature of the message is of this secret")


def _signature(message_id: str, timestamp: int, payload: str, key: bytes) -> str:
    signed = f"{message_id}.{timestamp}.{payload}".encode()
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
