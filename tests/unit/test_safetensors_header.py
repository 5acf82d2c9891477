"""A header is read exactly, or refused with every fault before anything it claims is believed."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors_bytes import framed, safetensors

from medley.spec.safetensors_header import MAX_HEADER_BYTES, HeaderError, SafetensorsHeader, TensorInfo, read_header


def read(content: bytes, size_bytes: int | None = None) -> SafetensorsHeader:
    return read_header(io.BytesIO(content), size_bytes=len(content) if size_bytes is None else size_bytes)


def refusal(content: bytes) -> str:
    with pytest.raises(HeaderError) as caught:
        read(content)
    assert caught.value.faults
    return str(caught.value)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(entries: dict[str, object], num_bytes: int) -> bytes:
    return framed(json.dumps(entries).encode(), bytes(num_bytes))


def test_a_sound_file_gives_each_tensor_in_the_order_of_its_data() -> None:
    content = file_of(
        {"__metadata__": {"format": "pt"}, "late": entry("BF16", [2, 3], [8, 20]), "early": entry()}, num_bytes=20
    )
    header = read(content)
    assert list(header.tensors) == ["early", "late"]
    assert header.tensors["late"] == TensorInfo("BF16", (2, 3), 8, 20)
    assert header.metadata == {"format": "pt"}
    assert header.data_start + header.data_bytes == len(content)


def test_scalars_empty_tensors_and_padding_after_the_object_are_sound() -> None:
    header = framed(json.dumps({"a": entry("F32", [], [0, 4]), "b": entry("F16", [0, 7], [4, 4])}).encode() + b"   ")
    assert set(read(header + bytes(4)).tensors) == {"a", "b"}


def test_an_empty_file_and_one_cut_at_any_byte_are_refused() -> None:
    content = safetensors({"a": ("F32", [2, 2]), "b": ("F16", [3])})
    read(content)
    for num_bytes in range(len(content)):
        with pytest.raises(HeaderError):
            read(content[:num_bytes])
    with pytest.raises(HeaderError, match="where the last tensor ends"):
        read(content + b"x")


def test_a_header_that_announces_too_much_is_refused_unread() -> None:
    for announced in (MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1):
        assert "at most" in refusal(struct.pack("<Q", announced) + b"{}")
    assert "cut off" in refusal(struct.pack("<Q", MAX_HEADER_BYTES) + b"{}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "starts at once"),
        (b" {}", "starts at once"),
        (b"[]", "starts at once"),
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"a": 1, "a": 2}', "stands twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "stands twice"),
        (b'{"a": ' + b"[" * 100_000, "nested deeper"),
        (b'{"\xff": 1}', "not UTF-8"),
        (b'{"\\ud800": 1}', "surrogate"),
    ],
)
def test_text_that_two_readers_could_understand_differently_is_refused(text: bytes, says: str) -> None:
    assert says in refusal(framed(text))


def test_brackets_inside_strings_do_not_count_as_depth() -> None:
    name = "[" * 50 + '\\"' + "{" * 50
    assert list(read(safetensors({name: ("F32", [1])})).tensors) == [name]


def test_a_hostile_header_of_the_largest_size_is_refused_in_seconds() -> None:
    for pattern in (b'\\"', b'"'):
        text = b'{"' + pattern * (MAX_HEADER_BYTES // len(pattern) - 2)
        started = time.monotonic()
        refusal(framed(text))
        assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (entry(dtype="F31"), "dtype 'F31'"),
        (entry(dtype=None), "dtype None"),
        (entry(dtype=["F32"]), "dtype ['F32']"),
        (entry(shape=[-2]), "shape [-2]"),
        (entry(shape=[2.0]), "shape [2.0]"),
        (entry(shape=[True, 2]), "shape [True, 2]"),
        (entry(shape="2"), "shape '2'"),
        (entry(shape=[1] * 9), "shape [1, 1"),
        (entry(shape=[2**62, 2**62]), "a shape that fits the file"),
        (entry(shape=[3]), "12 for F32"),
        (entry(dtype="F16"), "4 for F16"),
        (entry(offsets=[-8, 0]), "data_offsets [-8, 0]"),
        (entry(offsets=[8, 0]), "data_offsets [8, 0]"),
        (entry(offsets=[0, 9]), "data_offsets [0, 9]"),
        (entry(offsets=[0, 2**62]), "data_offsets"),
        (entry(offsets=[0]), "data_offsets [0]"),
        (entry(offsets=[0, 4, 8]), "data_offsets [0, 4, 8]"),
        (entry(offsets=None), "data_offsets None"),
        (entry() | {"extra": 1}, "an object of dtype"),
        ({"dtype": "F32"}, "an object of dtype"),
        (7, "an object of dtype"),
    ],
)
def test_a_broken_entry_is_refused_by_tensor_and_field(broken: object, says: str) -> None:
    message = refusal(file_of({"weight": broken}, num_bytes=8))
    assert says in message
    assert "weight" in message


def test_metadata_must_be_strings() -> None:
    for metadata in ({"a": 1}, [], "x"):
        assert "an object of strings" in refusal(file_of({"__metadata__": metadata}, num_bytes=0))


def test_overlaps_and_gaps_are_refused() -> None:
    assert "overlaps" in refusal(file_of({"a": entry(), "b": entry(offsets=[4, 12])}, num_bytes=12))
    assert "overlaps" in refusal(file_of({"a": entry(), "b": entry()}, num_bytes=8))
    assert "gap" in refusal(file_of({"a": entry(), "b": entry(offsets=[12, 20])}, num_bytes=20))
    assert "gap" in refusal(file_of({"a": entry(offsets=[4, 12])}, num_bytes=12))


def test_every_broken_entry_is_named_at_once_up_to_a_limit() -> None:
    message = refusal(file_of({"one": entry(dtype="X"), "two": entry(shape=[9]), "three": 0}, num_bytes=8))
    assert all(name in message for name in ("one", "two", "three"))
    with pytest.raises(HeaderError) as caught:
        read(file_of({f"t{i}": 0 for i in range(1000)}, num_bytes=0))
    assert len(caught.value.faults) == 51
    assert "950 more faults" in str(caught.value)


def test_a_name_is_escaped_before_it_is_shown() -> None:
    message = refusal(file_of({"\x1b[2J\x00" + "n" * 5000: 0}, num_bytes=0))
    assert "\x1b" not in message
    assert "\x00" not in message
    assert len(message) < 500


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipping_bytes_never_yields_a_range_outside_the_file(data: st.DataObject) -> None:
    content = bytearray(safetensors({"a": ("F32", [2, 2]), "b": ("F16", [3]), "c": ("BF16", [0])}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = read(bytes(content))
    except HeaderError:
        return
    at = 0
    for info in header.tensors.values():
        assert info.begin == at
        at = info.end
    assert header.data_start + at == len(content)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_by_a_header_error_alone(content: bytes) -> None:
    for candidate in (content, framed(content), framed(b"{" + content)):
        with contextlib.suppress(HeaderError):
            read(candidate)
