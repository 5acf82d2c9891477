"""Frames between shell and engine survive any cutting of the stream, and each message comes back equal."""

from __future__ import annotations

import struct
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medley.spec.errors import ErrorCode, JobError
from medley.spec.jobs import Checkpoint, Details, FinishReason
from medley.spec.sampling import SamplingParams
from medley.spec.wire import (
    MAX_FRAME_BYTES,
    Abort,
    AdapterRef,
    Add,
    EngineStats,
    Finished,
    Forget,
    FrameReader,
    JobKey,
    Progress,
    Ready,
    Release,
    Released,
    Running,
    Shutdown,
    Upcoming,
    WorkItem,
    encode_frame,
    from_engine_decoder,
    to_engine_decoder,
)

KEY = JobKey(UUID(int=7), 3)
ADAPTER = AdapterRef(UUID(int=1), UUID(int=2), "/adapters/2")
CHECKPOINT = Checkpoint(token_ids=(1, 2), logprobs=(-0.5, -1e-30))
DETAILS = Details(
    top_token_ids=(3,), top_logprobs=(-0.5,), prompt_token_ids=(1, 2), prompt_logprobs=(-1.5,), is_greedy=False
)
DETAILED = Checkpoint(token_ids=(1,), logprobs=(-0.5,), details=DETAILS)
TO_ENGINE = [
    Add((WorkItem(KEY, (1, 2, 3), ADAPTER, SamplingParams(seed=2**63 - 1, logit_bias={5: -1.5}, stop=("é",))),)),
    Add((WorkItem(KEY, (), None, SamplingParams(), CHECKPOINT, True, -4),)),
    Add((WorkItem(KEY, (1, 2), None, SamplingParams(json_schema={"a": 1}), DETAILED, num_continuation=1),)),
    Abort((KEY, KEY)),
    Release(None),
    Release((KEY,)),
    Upcoming((ADAPTER,)),
    Forget((ADAPTER,)),
    Shutdown(),
]
FROM_ENGINE = [
    Ready(64, 4096, 100, 16, 512, 32_000, 1.5),
    Running((KEY,)),
    Progress(KEY, (9,), (-0.25,)),
    Finished(KEY, (1, 2), (-0.5, -0.75), FinishReason.STOP),
    Finished(KEY, (1,), (-0.5,), FinishReason.SCORED, details=DETAILS),
    Progress(KEY, (9,), (-0.25,), DETAILS),
    Released(KEY, DETAILED),
    Finished(KEY, (), (), None, JobError(code=ErrorCode.NUMERICAL, message="NaN logits")),
    Released(KEY, CHECKPOINT),
    EngineStats(steps=3, step_s=0.5, resident=(UUID(int=2),)),
]


@pytest.mark.parametrize("message", TO_ENGINE)
def test_what_the_shell_sends_is_what_the_engine_reads(message: object) -> None:
    (body,) = FrameReader().feed(encode_frame(message))  # type: ignore[arg-type]
    assert to_engine_decoder.decode(body) == message


@pytest.mark.parametrize("message", FROM_ENGINE)
def test_what_the_engine_sends_is_what_the_shell_reads(message: object) -> None:
    (body,) = FrameReader().feed(encode_frame(message))  # type: ignore[arg-type]
    assert from_engine_decoder.decode(body) == message


def test_no_message_of_one_direction_is_taken_for_one_of_the_other() -> None:
    for message in TO_ENGINE:
        with pytest.raises(msgspec.ValidationError):
            from_engine_decoder.decode(FrameReader().feed(encode_frame(message))[0])  # type: ignore[arg-type]
    for message in FROM_ENGINE:
        with pytest.raises(msgspec.ValidationError):
            to_engine_decoder.decode(FrameReader().feed(encode_frame(message))[0])  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=200))
def test_frames_come_out_whole_and_in_order_however_the_stream_is_cut(cuts: list[int]) -> None:
    stream = b"".join(encode_frame(message) for message in FROM_ENGINE)  # type: ignore[arg-type]
    reader, bodies, at = FrameReader(), [], 0
    for size in [*cuts, len(stream)]:
        bodies += reader.feed(stream[at : at + size])
        at += size
    assert [from_engine_decoder.decode(body) for body in bodies] == FROM_ENGINE
    assert reader.feed(b"") == []


def test_an_empty_body_is_a_frame() -> None:
    assert FrameReader().feed(bytes(8)) == [b"", b""]


def test_a_frame_that_announces_too_much_is_refused_before_it_is_held() -> None:
    with pytest.raises(ValueError, match="announces"):
        FrameReader().feed(struct.pack("<I", MAX_FRAME_BYTES + 1))
    assert FrameReader().feed(struct.pack("<I", MAX_FRAME_BYTES)) == []


def test_a_message_too_large_for_a_frame_is_refused_by_its_sender() -> None:
    item = WorkItem(KEY, (2**31 - 1,) * 1_000_000, None, SamplingParams())
    with pytest.raises(ValueError, match="send fewer items"):
        encode_frame(Add((item,) * 14))


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_a_body_that_is_no_message_is_a_decode_error(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        to_engine_decoder.decode(b"\xc1" + body)


def test_a_plain_end_has_no_word_of_details() -> None:
    (body,) = FrameReader().feed(encode_frame(Finished(KEY, (1,), (-0.5,), FinishReason.STOP)))
    assert b"details" not in body
    assert b"error" not in body
