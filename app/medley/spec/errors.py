"""Faults of input and errors of jobs, as data.

A `Fault` is one thing wrong with what a tenant sent; a `JobError` is why a job ended without a result.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing wrong with an input: the field, what it got, what it wanted, and the line of a JSONL file."""

    field: str
    got: str
    wanted: str
    line: int | None = None  # 1-based

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self.field}: got {self.got}, wanted {self.wanted}"


class ErrorCode(StrEnum):
    """Why a job failed. The set is closed: a client may match on it."""

    PROMPT_TOO_LONG = "prompt_too_long"  # prompt + 1 tokens exceed the model's length
    INVALID_TOKEN = "invalid_token"  # a token id outside the vocabulary
    INVALID_GRAMMAR = "invalid_grammar"  # json_schema, regex or choice cannot be compiled within the limits
    ADAPTER_UNAVAILABLE = "adapter_unavailable"  # its files could not be read, or it was deleted
    ADAPTER_TOO_LARGE = "adapter_too_large"  # it does not fit the worker's adapter memory
    ADAPTER_REVOKED = "adapter_revoked"  # its owner shares it no longer
    ADAPTER_QUARANTINED = "adapter_quarantined"  # it killed engines by itself
    JOB_QUARANTINED = "job_quarantined"  # it killed engines by itself
    NUMERICAL = "numerical"  # NaN logits
    ENGINE = "engine"  # a fault of the engine that is bound to this job


RETRYABLE = frozenset({ErrorCode.ADAPTER_UNAVAILABLE, ErrorCode.ENGINE})


class JobError(msgspec.Struct, frozen=True, kw_only=True):
    """A job's failure: `code` of the closed set, `message` for people (never holds the prompt)."""

    code: ErrorCode
    message: str

    @property
    def is_retryable(self) -> bool:
        return self.code in RETRYABLE
