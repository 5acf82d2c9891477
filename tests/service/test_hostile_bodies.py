"""Hostile JSON and lines through a running API: each is a clear 4xx with its faults, and leaves no trace."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hostile import MAX_BODY_BYTES, MAX_GROWTH_BYTES, MIB, Target, running_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medley.local.embedded import EmbeddedServers

LINES = {"Content-Type": "application/x-ndjson"}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def target(
    module_database: Any, embedded: EmbeddedServers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    with running_target(module_database, embedded.redis_url, tmp_path_factory.mktemp("target")) as target:
        before, peak = target.snapshot(), target.peak_bytes()
        yield target
        assert target.snapshot() == before, "nothing was written"
        growth = (target.peak_bytes() - peak) // MIB
        assert growth < MAX_GROWTH_BYTES // MIB
        assert target.serves()


# A job that is no job, as the bytes of its JSON; the same for a line, an element of an array and a body.
HOSTILE_JOBS: dict[str, bytes] = {
    "nothing": b"{}",
    "null": b"null",
    "a number": b"1",
    "a list": b"[]",
    "a text": b'"x"',
    "no prompt": b'{"max_tokens":1}',
    "two prompts": b'{"prompt":"x","prompt_token_ids":[1]}',
    "an empty prompt": b'{"prompt":""}',
    "a prompt of NUL": b'{"prompt":"a\\u0000b"}',
    "a raw NUL": b'{"prompt":"a\0b"}',
    "half a surrogate pair": b'{"prompt":"\\ud800"}',
    "the other half": b'{"prompt":"\\udc00x"}',
    "a pair the wrong way round": b'{"prompt":"\\udc00\\ud800"}',
    "no UTF-8": b'{"prompt":"\xff\xfe"}',
    "an overlong form": b'{"prompt":"\xc0\x80"}',
    "a surrogate in UTF-8": b'{"prompt":"\xed\xa0\x80"}',
    "a long prompt": b'{"prompt":"' + b"x" * 4097 + b'"}',
    "a long prompt of wide characters": b'{"prompt":"' + "€".encode() * 1400 + b'"}',
    "no number": b'{"prompt":"x","max_tokens":NaN}',
    "infinity": b'{"prompt":"x","temperature":Infinity}',
    "a number beyond floats": b'{"prompt":"x","temperature":1e999}',
    "a number of many digits": b'{"prompt":"x","seed":' + b"9" * 5000 + b"}",
    "a number beyond 64 bits": b'{"prompt":"x","seed":18446744073709551616}',
    "a number below nothing": b'{"prompt":"x","max_tokens":-1}',
    "a float for a whole number": b'{"prompt":"x","max_tokens":1.5}',
    "a text for a number": b'{"prompt":"x","max_tokens":"1"}',
    "a true for a number": b'{"prompt":"x","max_tokens":true}',
    "more tokens than there are": b'{"prompt":"x","max_tokens":9223372036854775808}',
    "a token below nothing": b'{"prompt_token_ids":[-1]}',
    "a token beyond 31 bits": b'{"prompt_token_ids":[2147483648]}',
    "tokens of other kinds": b'{"prompt_token_ids":[1,"2",null,1.5]}',
    "no tokens": b'{"prompt_token_ids":[]}',
    "tokens in tokens": b'{"prompt_token_ids":[[1]]}',
    "many tokens": b'{"prompt_token_ids":[' + b"1," * 2000 + b"1]}",
    "a field that is none": b'{"prompt":"x","tenant":"acme"}',
    "a field that is dangerous elsewhere": b'{"prompt":"x","__proto__":{"a":1},"constructor":1}',
    "a field twice": b'{"prompt":"x","prompt":"y"}',
    "a field twice, once escaped": b'{"prompt":"x","pr\\u006fmpt":"y"}',
    "a label of NUL": b'{"prompt":"x","custom_id":"\\u0000"}',
    "a long label": b'{"prompt":"x","custom_id":"' + b"x" * 300 + b'"}',
    "an adapter by a path": b'{"prompt":"x","adapter":"../../etc/passwd"}',
    "an adapter of NUL": b'{"prompt":"x","adapter":"a\\u0000"}',
    "another tenant of NUL": b'{"prompt":"x","adapter":"a\\u0000/b"}',
    "an adapter by SQL": b'{"prompt":"x","adapter":"a\' OR 1=1 --"}',
    "a long adapter": b'{"prompt":"x","adapter":"' + b"a" * 5000 + b'"}',
    "an adapter of another kind": b'{"prompt":"x","adapter":["sound"]}',
    "stops that are many": b'{"prompt":"x","stop":[' + b'"s",' * 500 + b'"s"]}',
    "a stop of NUL": b'{"prompt":"x","stop":["\\u0000"]}',
    "an empty stop": b'{"prompt":"x","stop":[""]}',
    "biases of no tokens": b'{"prompt":"x","logit_bias":{"a":1}}',
    "biases beyond floats": b'{"prompt":"x","logit_bias":{"1":1e400}}',
    "nested deep": b'{"prompt":' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "nested deep and open": b'{"a":' * 20_000,
    "nested deep in a bias": b'{"prompt":"x","logit_bias":' + b'{"1":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
    "cut": b'{"prompt":"x"',
    "more than one": b'{"prompt":"x"} {"prompt":"y"}',
    "a comma too many": b'{"prompt":"x",}',
    "a comment": b'{"prompt":"x" /* y */}',
    "single quotes": b"{'prompt':'x'}",
}


@pytest.mark.parametrize("name", HOSTILE_JOBS)
def test_a_hostile_job_is_refused_alone_in_an_array_and_in_a_line(target: Target, name: str) -> None:
    job = HOSTILE_JOBS[name]
    target.refused(target.client.post("/v1/jobs", content=job, headers=JSON))
    array = b'{"jobs":[{"prompt":"fine"},' + job + b"]}"
    target.refused(target.client.post("/v1/batches", content=array, headers=JSON))
    if b"\n" not in job:
        lines = b'{"prompt":"fine"}\n' + job + b'\n{"prompt":"fine"}\n'
        response = target.client.post("/v1/batches", content=lines, headers=LINES)
        target.refused(response)
        assert {fault.get("line") for fault in response.json()["error"]["faults"]} == {2}, response.text[:500]


def test_every_fault_of_every_line_is_in_one_answer(target: Target) -> None:
    jobs = list(HOSTILE_JOBS.values())
    response = target.client.post("/v1/batches", content=b"\n".join(jobs), headers=LINES)
    target.refused(response)
    assert {fault["line"] for fault in response.json()["error"]["faults"]} == set(range(1, len(jobs) + 1))


FINE = b'{"prompt":"fine"}\n'
HOSTILE_FILES: dict[str, bytes] = {
    "nothing": b"",
    "blank lines": b"\n" * 100_000,
    "a byte order mark": b"\xef\xbb\xbf" + FINE,
    "UTF-16": FINE.decode().encode("utf-16"),
    "UTF-32": FINE.decode().encode("utf-32"),
    "gzip": gzip.compress(FINE * 1000),
    "an array": b"[" + FINE.strip() + b"]",
    "a line without end": b'{"prompt":"' + b"x" * (6 * MIB),
    "a line of blanks without end": FINE + b" " * (6 * MIB),
    "a line of brackets without end": b"[" * (6 * MIB),
    "lines of numbers": b"1\n" * (3 * MIB),
    "lines of empty objects": b"{}\n" * (2 * MIB),
    "lines of NUL": b"\0\n" * 100_000,
    "NULs": b"\0" * MIB,
    "carriage returns alone": FINE.strip() + b"\r" + FINE.strip() + b"\r" + b"x",
    "a label twice": b'{"prompt":"x","custom_id":"a"}\n' * 2,
    "more than the limit": FINE * (MAX_BODY_BYTES // len(FINE) + 1),
    "other separators": FINE.strip() + "\u2028".encode() + FINE.strip(),
    "form feeds": FINE.strip() + b"\x0c" + FINE.strip(),
}


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_hostile_files_of_lines_are_refused(target: Target, name: str) -> None:
    target.refused(target.client.post("/v1/batches", content=HOSTILE_FILES[name], headers=LINES))


HOSTILE_BODIES: dict[str, bytes] = {
    "nothing": b"",
    "no object": b"[]",
    "a byte order mark": b'\xef\xbb\xbf{"jobs":[{"prompt":"x"}]}',
    "no jobs": b'{"jobs":[]}',
    "jobs of another kind": b'{"jobs":{"prompt":"x"}}',
    "jobs twice": b'{"jobs":[{"prompt":"x"}],"jobs":[{"prompt":"y"}]}',
    "millions of numbers": b'{"jobs":[' + b"1," * (4 * MIB - 100) + b"1]}",
    "millions of lists": b'{"jobs":[' + b"[]," * (2 * MIB) + b"[]]}",
    "millions of objects": b'{"jobs":[' + b"{}," * (2 * MIB) + b"{}]}",
    "millions of fields": b"{" + b",".join(b'"%d":0' % i for i in range(600_000)) + b"}",
    "millions of tokens": b'{"jobs":[{"prompt_token_ids":[' + b"1," * (3 * MIB) + b"1]}]}",
    "brackets": b"[" * (7 * MIB),
    "quotes": b'"' * (7 * MIB),
    "backslashes": b'"' + b"\\" * (7 * MIB),
    "blanks": b" " * (7 * MIB),
    "an endless text": b'{"jobs":"' + b"a" * (7 * MIB) + b'"}',
    "an endless name": b'{"' + b"a" * (7 * MIB) + b'":1}',
    "defaults of other kinds": b'{"jobs":[{"prompt":"x"}],"defaults":[]}',
    "defaults that are wrong": b'{"jobs":[{"prompt":"x"}],"defaults":{"max_tokens":-1,"adapter":"none"}}',
    "a time that is none": b'{"jobs":[{"prompt":"x"}],"deadline_at":"yesterday"}',
    "a time without a zone": b'{"jobs":[{"prompt":"x"}],"deadline_at":"2030-01-01T00:00:00"}',
    "a time beyond time": b'{"jobs":[{"prompt":"x"}],"deadline_at":"99999-01-01T00:00:00Z"}',
    "a priority that is none": b'{"jobs":[{"prompt":"x"}],"priority":"highest"}',
    "a name of NUL": b'{"jobs":[{"prompt":"x"}],"name":"\\u0000"}',
    "more than the limit": b'{"jobs":"' + b"a" * MAX_BODY_BYTES + b'"}',
}


@pytest.mark.parametrize("name", HOSTILE_BODIES)
def test_hostile_bodies_are_refused(target: Target, name: str) -> None:
    target.refused(target.client.post("/v1/batches", content=HOSTILE_BODIES[name], headers=JSON))


HOSTILE_SWEEPS: dict[str, dict[str, Any] | bytes] = {
    "a name of a path": {"name": "../x"},
    "a name of NUL": {"name": "a\0"},
    "a name like an id": {"name": "sweep_" + "0" * 32},
    "no prompts": {"prompts": []},
    "prompts of other kinds": {"prompts": [1, None, {}, [], {"prompt": 1}]},
    "patterns without end": {"adapters": ["[" * 290, "*a" * 140]},
    "many patterns": {"adapters": ["sound"] * 1001},
    "no pattern": {"adapters": []},
    "another tenant's": {"adapters": ["acme/*", "*/*"]},
    "seeds that are none": {"seeds": [-1, 2**70, 1, 1]},
    "many seeds": {"seeds": list(range(1001))},
    "more cells than allowed": {"prompts": ["x"] * 1100, "seeds": list(range(1000))},
    "an expected text of NUL": {"prompts": [{"prompt": "x", "expected": "\0"}]},
    "a field twice": b'{"name":"s","name":"t","prompts":["x"],"adapters":["sound"]}',
    "millions of prompts": b'{"name":"s","adapters":["sound"],"prompts":[' + b"1," * (3 * MIB) + b"1]}",
    "prompts of one letter": b'{"name":"s","adapters":["sound"],"prompts":[' + b'"",' * (2 * MIB) + b'""]}',
}


@pytest.mark.parametrize("name", HOSTILE_SWEEPS)
def test_hostile_sweeps_are_refused(target: Target, name: str) -> None:
    given = HOSTILE_SWEEPS[name]
    body = {"name": "s", "prompts": ["x"], "adapters": ["sound"]}
    content = given if isinstance(given, bytes) else json.dumps(body | given).encode()
    target.refused(target.client.post("/v1/sweeps", content=content, headers=JSON))


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/batches", "/v1/sweeps", "/v1/adapters/sound/grants"])
def test_compressed_bodies_are_refused_unread(target: Target, path: str) -> None:
    bomb = gzip.compress(bytes(64 * MIB), compresslevel=1)
    for encoding in ("gzip", "deflate, gzip", "br", "zstd"):
        response = target.client.post(path, content=bomb[:100_000], headers=JSON | {"Content-Encoding": encoding})
        assert response.status_code == 415, encoding
        target.refused(response)


IDS = [
    "job_x",
    "job_" + "0" * 32,
    "batch_" + "F" * 32,
    "%00",
    "..",
    "..%2f..",
    "a" * 5000,
    "job_" + "\uff10" * 32,
    "%F0",
]


@pytest.mark.parametrize("value", IDS)
def test_hostile_ids_are_not_found(target: Target, value: str) -> None:
    for path in ("jobs/{}", "batches/{}", "batches/{}/results", "sweeps/{}", "sweeps/{}/report", "adapters/{}"):
        response = target.client.get(f"/v1/{path.format(value)}")
        assert response.status_code in (400, 404, 405), (path, response.status_code)
        target.refused(response)


def test_hostile_queries_are_refused(target: Target) -> None:
    batch = target.client.get("/v1/batches").json()["batches"][0]["id"]
    for query in (
        "limit=0",
        "limit=1e3",
        "limit=" + "9" * 5000,
        "limit=%00",
        "after=-1",
        "after=9223372036854775808",
        "wait=nan",
        "wait=-1",
        "wait=1e9",
        "include=secrets",
        "include=%00",
        "unknown=1",
        "&".join(f"p{i}=1" for i in range(500)),
    ):
        response = target.client.get(f"/v1/batches/{batch}/results?{query}")
        assert response.status_code == 400, query
        target.refused(response)
    for query in ("deadline_at=%00", "name=%00", "defaults=[]", "priority=x", "defaults=" + "%7B%22a%22:" * 3000):
        target.refused(target.client.post(f"/v1/batches?{query}", content=FINE, headers=LINES))
    for query in ("after=%00", "after=a", "limit=-5"):
        target.refused(target.client.get(f"/v1/shared-adapters?{query}"))


def test_hostile_headers_are_refused(target: Target) -> None:
    for value in (
        "Bearer " + "x" * 5000,
        "Bearer mk_\u00e9",
        "Basic eDp5",
        "Bearer",
        "Bearer mk_0_" + "a" * 43,
    ):
        response = httpx.get(f"{target.url}/v1/tenant", headers={"Authorization": value.encode("latin-1")})
        assert response.status_code == 401
        target.refused(response)
    for key in ("", "x" * 201, "a\tb"):
        target.refused(target.client.post("/v1/jobs", json={"prompt": "x"}, headers={"Idempotency-Key": key}))
    head = f"GET /v1/tenant HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {target.key}\r\n".encode()
    for more in (b"X: " + b"a" * 200_000, b"\r\n".join(b"X%d: y" % i for i in range(20_000)), b"X\0: y", b"no colon"):
        answer = target.raw([head + more + b"\r\n\r\n"])
        assert not answer or answer.split(b" ", 2)[1].startswith((b"4", b"2")), answer[:100]
        assert target.serves()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values.filter(lambda value: not isinstance(value, str)))
def test_a_prompt_of_any_other_kind_is_refused(target: Target, value: Any) -> None:
    body = json.dumps({"prompt": value}).encode()
    target.refused(target.client.post("/v1/jobs", content=body, headers=JSON))
    target.refused(target.client.post("/v1/batches", content=body, headers=LINES))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=60))
def test_any_other_bytes_are_refused(target: Target, data: bytes) -> None:
    for path, headers in (("/v1/jobs", JSON), ("/v1/batches", JSON), ("/v1/batches", LINES), ("/v1/sweeps", JSON)):
        target.refused(target.client.post(path, content=data, headers=headers))
