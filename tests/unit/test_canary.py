from __future__ import annotations

import msgspec

from medley.spec.errors import ErrorCode, JobError
from medley.spec.ids import uuid7
from medley.spec.wire import Finished, JobKey
from medley_worker.shell.canary import Canary


def finished(key: JobKey, error: JobError | None = None) -> Finished:
    return Finished(key=key, token_ids=(), logprobs=(), finish_reason=None, error=error)


def test_only_its_own_answer_is_heard() -> None:
    canary = Canary()
    assert not canary.hear(finished(JobKey(uuid7(), 0)))
    assert not canary.is_answered
    assert canary.hear(finished(canary.item.key))
    assert canary.is_answered
    assert canary.fault is None


def test_an_error_is_a_fault_with_its_reason() -> None:
    canary = Canary()
    canary.hear(finished(canary.item.key, JobError(code=ErrorCode.NUMERICAL, message="NaN logits")))
    assert canary.fault == "numerical: NaN logits"


def test_what_it_asks_is_within_the_limits_of_every_job() -> None:
    item = Canary().item
    assert item.sampling.faults() == []
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(item), type=type(item)) == item
