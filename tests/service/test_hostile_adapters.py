"""Hostile uploads through a running API: each is a clear 4xx with its reasons, and leaves no trace."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_server import ADAPTERS, adapter_files
from hostile import MAX_GROWTH_BYTES, Target, running_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medley.local.embedded import EmbeddedServers

CONFIG = json.loads((ADAPTERS / "add/adapter_config.json").read_text())
WEIGHTS = (ADAPTERS / "add/adapter_model.safetensors").read_bytes()
HEADER_BYTES = struct.unpack("<Q", WEIGHTS[:8])[0]
HEADER: dict[str, Any] = json.loads(WEIGHTS[8 : 8 + HEADER_BYTES])
DATA = WEIGHTS[8 + HEADER_BYTES :]
NAMES = [name for name in HEADER if name != "__metadata__"]
FIRST, SECOND = NAMES[:2]
ROOT = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def target(
    module_database: Any, embedded: EmbeddedServers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    with running_target(module_database, embedded.redis_url, tmp_path_factory.mktemp("target")) as target:
        before, peak = target.snapshot(), target.peak_bytes()
        yield target
        assert target.snapshot() == before, "nothing was written"
        assert target.peak_bytes() - peak < MAX_GROWTH_BYTES
        assert target.serves()


def upload(target: Target, **files: bytes) -> httpx.Response:
    return target.client.put("/v1/adapters/bad", files=adapter_files(**files))


def framed(header: bytes, data: bytes = DATA) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def with_header(**changes: Any) -> bytes:
    return framed(json.dumps({**HEADER, **changes}).encode())


def changed(name: str, **fields: Any) -> bytes:
    return with_header(**{name: {**HEADER[name], **fields}})


def pickled() -> bytes:
    return b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R."


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../etc/passwd", b"0" * 1_000_000)
        archive.writestr("archive/data.pkl", pickled())
    return file.getvalue()


def deep(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def with_value(value: bytes, at: int = 100) -> bytes:
    return WEIGHTS[: 8 + HEADER_BYTES] + DATA[:at] + value + DATA[at + len(value) :]


HOSTILE_WEIGHTS: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"\0" * 7,
    "a length beyond the file": struct.pack("<Q", len(WEIGHTS)) + WEIGHTS[8:],
    "a length of 2**63": struct.pack("<Q", 2**63) + WEIGHTS[8:],
    "a length of 2**64 - 1": b"\xff" * 8 + WEIGHTS[8:],
    "a length of nothing": struct.pack("<Q", 0) + WEIGHTS[8:],
    "a length one short": struct.pack("<Q", HEADER_BYTES - 1) + WEIGHTS[8:],
    "data cut": WEIGHTS[:-1],
    "data added": WEIGHTS + b"\0",
    "no tensor": framed(b"{}", b""),
    "no object": framed(b"[]"),
    "blanks before the object": framed(b" " + json.dumps(HEADER).encode()),
    "a byte order mark": framed(b"\xef\xbb\xbf" + json.dumps(HEADER).encode()),
    "no UTF-8": framed(json.dumps(HEADER).encode().replace(b"lora_A", b"lora_\xff", 1)),
    "a surrogate": framed(json.dumps({**HEADER, "\ud800": 1}).encode()),
    "a NUL in a name": with_header(**{"a\0b": HEADER[FIRST]}),
    "a name twice": framed(b'{"x":1,' + json.dumps(HEADER).encode()[1:].replace(b'"', b'"x":2,"', 1)),
    "nested deep": framed(deep(100_000)),
    "nested deep in arrays": framed(b'{"a":' + b"[" * 100_000),
    "a million keys": framed(b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b"}"),
    "a long name": with_header(**{"x" * 100_000: HEADER[FIRST]}),
    "a number of many digits": framed(
        json.dumps(HEADER).encode().replace(b'"shape": [', b'"shape": [' + b"9" * 5000 + b",", 1)
    ),
    "a float for an extent": changed(FIRST, shape=[4.0, 64]),
    "a negative extent": changed(FIRST, shape=[-1, -64]),
    "extents that overflow": changed(FIRST, shape=[2**32, 2**32]),
    "extents that overflow to the right size": changed(FIRST, shape=[2**62, 4]),
    "many extents": changed(FIRST, shape=[1] * 1000),
    "a true for an extent": changed(FIRST, shape=[True, 64]),
    "a string for offsets": changed(FIRST, data_offsets="0:1"),
    "offsets reversed": changed(FIRST, data_offsets=HEADER[FIRST]["data_offsets"][::-1]),
    "offsets below nothing": changed(FIRST, data_offsets=[-8, 0]),
    "offsets beyond the data": changed(FIRST, data_offsets=[0, 2**40]),
    "tensors that overlap": changed(FIRST, data_offsets=HEADER[SECOND]["data_offsets"]),
    "another dtype": changed(FIRST, dtype="F64"),
    "a dtype that is none": changed(FIRST, dtype="O"),
    "a dtype of another kind": changed(FIRST, dtype=["F32"]),
    "integers": changed(FIRST, dtype="I16"),
    "metadata of numbers": with_header(__metadata__={"format": 1}),
    "a tensor of another layer": with_header(**{FIRST.replace("layers.0", "layers.99"): HEADER[FIRST]}),
    "a tensor too many": framed(
        json.dumps({**HEADER, "extra": {"dtype": "F32", "shape": [0], "data_offsets": [len(DATA)] * 2}}).encode()
    ),
    "a tensor too few": framed(json.dumps({k: v for k, v in HEADER.items() if k != FIRST}).encode()),
    "NaN": with_value(b"\xff" * 4),
    "infinity": with_value(b"\x80\x7f" * 2),
    "a zip": zipped(),
    "a pickle": pickled(),
    "a pickle behind a length": framed(pickled()),
    "a gzip": b"\x1f\x8b\x08\x00" + bytes(1000),
}


@pytest.mark.parametrize("name", HOSTILE_WEIGHTS)
def test_hostile_weights_are_refused(target: Target, name: str) -> None:
    target.refused(upload(target, weights=HOSTILE_WEIGHTS[name]))


HOSTILE_CONFIGS: dict[str, tuple[Any, str]] = {
    "a pattern for targets": (CONFIG | {"target_modules": "(a+)+$"}, "target_modules"),
    "patterns among targets": (CONFIG | {"target_modules": [".*q_proj", "v_proj"]}, "target_modules"),
    "a pattern for ranks": (CONFIG | {"rank_pattern": {"(.*a){20}": 4}}, "rank_pattern"),
    "targets that are none": (CONFIG | {"target_modules": ["lm_head", "embed_tokens"]}, "target_modules"),
    "targets of other kinds": (CONFIG | {"target_modules": [1, None, {}]}, "target_modules"),
    "a target in other letters": (CONFIG | {"target_modules": ["q\u200b_proj", "\uff51_proj"]}, "target_modules"),
    "a giant rank": (CONFIG | {"r": 10**9}, "adapter_config.r"),
    "a rank of many digits": (json.dumps(CONFIG).replace('"r": ', '"r": ' + "9" * 400, 1).encode(), "adapter_config"),
    "a rank of nothing": (CONFIG | {"r": 0}, "adapter_config.r"),
    "a rank below nothing": (CONFIG | {"r": -8}, "adapter_config.r"),
    "a float for a rank": (CONFIG | {"r": 8.0}, "adapter_config.r"),
    "a true for a rank": (CONFIG | {"r": True}, "adapter_config.r"),
    "a text for a rank": (CONFIG | {"r": "8"}, "adapter_config.r"),
    "null for a rank": (CONFIG | {"r": None}, "adapter_config.r"),
    "null for alpha": (CONFIG | {"lora_alpha": None}, "lora_alpha"),
    "alpha beyond floats": (
        json.dumps(CONFIG | {"lora_alpha": 0}).replace('"lora_alpha": 0', '"lora_alpha": 1e999').encode(),
        "adapter_config",
    ),
    "alpha NaN": (json.dumps(CONFIG | {"lora_alpha": float("nan")}).encode(), "adapter_config"),
    "another type": (CONFIG | {"peft_type": "IA3"}, "peft_type"),
    "a type in other letters": (CONFIG | {"peft_type": "L\u041eRA"}, "peft_type"),
    "another task": (CONFIG | {"task_type": "SEQ_CLS"}, "task_type"),
    "modules to save": (CONFIG | {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "DoRA": (CONFIG | {"use_dora": True}, "use_dora"),
    "a key that nobody knows": (CONFIG | {"trust_remote_code": True}, "trust_remote_code"),
    "layers that are not there": (CONFIG | {"layers_to_transform": [0, 10**6]}, "layers_to_transform"),
    "a key twice": (json.dumps(CONFIG).replace("{", '{"r": 8, "r": 4, ', 1).encode(), "adapter_config"),
    "nested deep": (deep(20_000), "adapter_config"),
    "no object": (b"[]", "adapter_config"),
    "no JSON": (b"\x80\x04", "adapter_config"),
    "a byte order mark": (b"\xef\xbb\xbf" + json.dumps(CONFIG).encode(), "adapter_config"),
    "UTF-16": (json.dumps(CONFIG).encode("utf-16"), "adapter_config"),
    "half a surrogate pair": (json.dumps(CONFIG | {"revision": "\ud800"}).encode(), "adapter_config"),
    "empty": (b"", "adapter_config"),
}


@pytest.mark.parametrize("name", HOSTILE_CONFIGS)
def test_hostile_configurations_are_refused_by_the_field(target: Target, name: str) -> None:
    config, field = HOSTILE_CONFIGS[name]
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    target.refused(upload(target, config=data), field)


def test_both_files_are_judged_in_one_answer(target: Target) -> None:
    config = json.dumps(CONFIG | {"r": 10**9, "use_dora": True, "bias": "all"}).encode()
    target.refused(upload(target, config=config, weights=with_value(b"\xff" * 4)), "r", "use_dora", "bias", "NaN")
    target.refused(upload(target, config=config, weights=zipped()), "use_dora", "safetensors")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SOUND = adapter_files()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(["dtype", "shape", "data_offsets", "more"]), value=json_values, name=st.sampled_from(NAMES)
)
def test_a_header_with_any_other_value_is_refused(target: Target, field: str, value: Any, name: str) -> None:
    if HEADER[name].get(field) != value:
        target.refused(upload(target, weights=changed(name, **{field: value})))


METADATA_AT = WEIGHTS.index(b'"__metadata__"')
METADATA_END = WEIGHTS.index(b"}", METADATA_AT)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, len(WEIGHTS) - 1), flip=st.integers(0, 8 * (8 + HEADER_BYTES) - 1))
def test_files_that_are_cut_or_changed_in_their_header_are_refused(target: Target, cut: int, flip: int) -> None:
    target.refused(upload(target, weights=WEIGHTS[:cut]))
    if not METADATA_AT <= flip // 8 <= METADATA_END:  # its text changes nothing
        data = bytearray(WEIGHTS)
        data[flip // 8] ^= 1 << flip % 8
        target.refused(upload(target, weights=bytes(data)))


# The body around the files.

BOUNDARY = b"a-boundary"


def part(name: str, data: bytes, *, disposition: str = "", more: bytes = b"") -> bytes:
    head = disposition or f'form-data; name="{name}"; filename="{name}"'
    return b"--" + BOUNDARY + b"\r\nContent-Disposition: " + head.encode() + b"\r\n" + more + b"\r\n" + data + b"\r\n"


BOTH = part("adapter_config.json", json.dumps(CONFIG).encode()) + part(ROOT, WEIGHTS)
END = b"--" + BOUNDARY + b"--\r\n"
MULTIPART = "multipart/form-data; boundary=a-boundary"

HOSTILE_BODIES: dict[str, tuple[bytes, str]] = {
    "a third part": (BOTH + part("tokenizer.json", b"{}") + END, MULTIPART),
    "a part twice": (BOTH + part(ROOT, WEIGHTS) + END, MULTIPART),
    "a path for a name": (part("adapter_config.json", b"{}") + part(f"../../{ROOT}", WEIGHTS) + END, MULTIPART),
    "an absolute name": (part("/adapter_config.json", b"{}") + part(f"/etc/{ROOT}", WEIGHTS) + END, MULTIPART),
    "a name with a NUL": (part("adapter_config.json\0", b"{}") + part(ROOT, WEIGHTS) + END, MULTIPART),
    "no names": (part("", b"{}", disposition="form-data") + part("", b"", disposition="attachment") + END, MULTIPART),
    "names in another header": (part("", b"{}", disposition="form-data", more=b"X-Name: a\r\n") + END, MULTIPART),
    "no boundary at the end": (BOTH, MULTIPART),
    "cut in a part": (BOTH[:-400], MULTIPART),
    "nothing": (b"", MULTIPART),
    "the end alone": (END, MULTIPART),
    "no boundary announced": (BOTH + END, "multipart/form-data"),
    "another boundary announced": (BOTH + END, "multipart/form-data; boundary=another"),
    "an empty boundary": (BOTH + END, 'multipart/form-data; boundary=""'),
    "a long boundary": (BOTH + END, "multipart/form-data; boundary=" + "b" * 4000),
    "not multipart": (WEIGHTS, "application/octet-stream"),
    "JSON": (b"{}", "application/json"),
    "a huge header": (part("adapter_config.json", b"{}", more=b"X: " + b"a" * 100_000 + b"\r\n") + END, MULTIPART),
    "many headers": (part("adapter_config.json", b"{}", more=b"X: y\r\n" * 10_000) + END, MULTIPART),
    "many parts": (part("x", b"") * 20_000 + END, MULTIPART),
    "a configuration of a MiB": (part("adapter_config.json", b" " * (1 << 20)) + part(ROOT, WEIGHTS) + END, MULTIPART),
    "weights beyond what the base can take": (
        part("adapter_config.json", b"{}") + part(ROOT, bytes(6 << 20)) + END,
        MULTIPART,
    ),
    "a transfer encoding": (
        part("adapter_config.json", b"e30=", more=b"Content-Transfer-Encoding: base64\r\n") + END,
        MULTIPART,
    ),
    "line feeds alone": ((BOTH + END).replace(b"\r\n", b"\n"), MULTIPART),
}


@pytest.mark.parametrize("name", HOSTILE_BODIES)
def test_hostile_bodies_are_refused(target: Target, name: str) -> None:
    body, kind = HOSTILE_BODIES[name]
    try:
        response = target.client.put("/v1/adapters/bad", content=body, headers={"Content-Type": kind})
    except httpx.WriteError:
        return  # refused while it was sent, and the answer was lost with the connection
    target.refused(response)


@pytest.mark.parametrize(
    "adapter", ["..", "a%2F..%2Fb", "%00", "a%0Ab", "%F0%9F%92%A9", ".hidden", "x" * 129, "-x", "a b", "%2e%2e"]
)
def test_hostile_names_are_refused(target: Target, adapter: str) -> None:
    response = target.client.put(f"/v1/adapters/{adapter}", files=SOUND)
    assert response.status_code in (400, 404, 405)
    target.refused(response)


def head(target: Target, **headers: str) -> bytes:
    lines = ["PUT /v1/adapters/bad HTTP/1.1", "Host: x", f"Authorization: Bearer {target.key}", "Connection: close"]
    lines += [f"Content-Type: {MULTIPART}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_lies_about_a_bodys_length_are_refused(target: Target) -> None:
    body = BOTH + END
    chunk = b"%x\r\n" % len(body) + body + b"\r\n"
    lies: dict[str, tuple[list[bytes], bool]] = {
        "longer than sent": ([head(target, Content_Length=str(len(body) + 100)), body], True),
        "shorter than sent": ([head(target, Content_Length=str(len(body) - 100)), body], False),
        "below nothing": ([head(target, Content_Length="-1"), body], False),
        "no number": ([head(target, Content_Length="1e9"), body], False),
        "beyond every limit": ([head(target, Content_Length=str(10**15)), body], False),
        "two lengths": (
            [head(target, Content_Length="10").replace(b"\r\n\r\n", b"\r\nContent-Length: 20\r\n\r\n"), body],
            False,
        ),
        "chunks without end": ([head(target, Transfer_Encoding="chunked"), chunk], True),
        "a chunk shorter than it says": (
            [head(target, Transfer_Encoding="chunked"), b"fffff\r\n", body, b"\r\n0\r\n\r\n"],
            True,
        ),
        "a chunk of no size": ([head(target, Transfer_Encoding="chunked"), b"zz\r\n", body], False),
        "a chunk of a giant size": ([head(target, Transfer_Encoding="chunked"), b"ffffffffffffffff\r\n", body], True),
    }
    for name, (parts, then_close) in lies.items():
        answer = target.raw(parts, then_close=then_close)
        status = answer.split(b" ", 2)[1:2]
        assert not status or status[0].startswith(b"4"), (name, answer[:200])
        assert target.serves(), name


def test_chunks_beyond_the_limit_are_refused_before_their_end(target: Target) -> None:
    megabyte = b"100000\r\n" + bytes(1 << 20) + b"\r\n"

    def endless() -> Iterator[bytes]:
        yield head(target, Transfer_Encoding="chunked")
        yield b"%x\r\n" % len(part(ROOT, b"")) + part(ROOT, b"") + b"\r\n"
        for _ in range(2_000):
            yield megabyte

    answer = target.raw(endless())
    assert b" 413 " in answer[:20] or answer == b"", answer[:200]


def test_the_sound_adapter_is_still_taken(target: Target) -> None:
    assert target.client.put("/v1/adapters/sound", files=SOUND).status_code == 200
