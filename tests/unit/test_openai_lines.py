"""Whatever stands in a line of a batch, it becomes a request or errors that can be stored, and never an exception."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_template import MISTRAL, QWEN25, TOKENS

from medley.api.openai.bodies import ChatBody, CompletionBody
from medley.api.openai.chat_template import ChatTemplate
from medley.api.openai.lines import Line, LineReader
from medley.api.openai.requests import CHAT, COMPLETIONS, RequestReader, job_columns
from medley.config import Limits

LIMITS = Limits(max_prompt_bytes=500)
READERS = [LineReader(RequestReader(LIMITS, ChatTemplate({"default": t}, TOKENS), 64)) for t in (QWEN25, MISTRAL)]
FIELDS = [f.name for kind in (CompletionBody, ChatBody) for f in msgspec.structs.fields(kind)] + ["colour"]

texts = st.text(st.characters(codec=None), max_size=8)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=8)
calls = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": texts, "arguments": texts})})
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "x"])},
        optional={
            "content": texts | st.none() | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": texts})),
            "tool_calls": st.lists(calls, max_size=2),
            "name": values,
        },
    ),
    max_size=4,
)
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=4).flatmap(
    lambda other: st.fixed_dictionaries(
        {"model": st.just("m") | values},
        optional={"prompt": texts | st.lists(texts) | st.lists(st.integers()) | values, "messages": messages},
    ).map(lambda body: {**other, **body})
)


def check(line: Line) -> None:
    assert line.errors or line.request is not None
    for error in line.errors:
        assert "\0" not in f"{error.message}{error.param}"
        f"{error.message}{error.param}".encode()
    if line.request is not None and not line.errors:
        columns = job_columns([(line.request, line.custom_id, None)], "base")
        assert len(columns) == line.request.num_jobs >= 1
        for prompt in columns.prompts or ():
            assert prompt is None or ("\0" not in prompt and 1 <= len(prompt.encode()) <= LIMITS.max_prompt_bytes)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_judged(data: bytes) -> None:
    check(READERS[0].read(data, 1, COMPLETIONS))


@settings(max_examples=200, deadline=None)
@given(body=bodies, custom_id=texts, reader=st.sampled_from(READERS), endpoint=st.sampled_from([COMPLETIONS, CHAT]))
def test_any_fields_of_a_body_are_judged(
    body: dict[str, Any], custom_id: str, reader: LineReader, endpoint: str
) -> None:
    line = {"custom_id": custom_id, "method": "POST", "url": endpoint, "body": body}
    check(reader.read(json.dumps(line).encode(), 1, endpoint))


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m", "prompt": "x", "logit_bias": {"99999999999999999999999": 1}}',
        b'{"model": "m", "prompt": "x", "temperature": 1e999}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b'{"model": "\\ud800\\u0000", "prompt": "x"}',
        b'{"model": "m", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"model": "m", "prompt": "x", "model": 1}',
        b'{"model": "m", "prompt": [' + b"1," * 3000 + b"1]}",
    ],
)
def test_values_at_the_edges_of_json_are_judged(body: bytes) -> None:
    line = b'{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": ' + body + b"}"
    check(READERS[0].read(line, 1, COMPLETIONS))
