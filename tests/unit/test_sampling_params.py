"""Sampling fields are taken within their limits; every fault is named at once and nothing is ignored."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medley.spec.sampling import FIELDS, SamplingParams, parse_sampling


def faults_of(fields: dict[str, Any]) -> list[str]:
    params, faults = parse_sampling(fields)
    assert (params is None) == bool(faults)
    return [str(fault) for fault in faults]


def test_no_fields_give_the_defaults() -> None:
    assert parse_sampling({}) == (SamplingParams(), [])


def test_every_field_is_taken_as_json_gives_it() -> None:
    fields = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 1,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {"3": -100, "4": 0.5},
        "seed": 2**63 - 1,
        "stop": ["\n", "END"],
        "stop_token_ids": [1, 2],
        "ignore_eos": True,
        "top_logprobs": 20,
        "prompt_logprobs": 0,
    }
    assert set(fields) | {"json_schema", "regex", "choice"} == set(FIELDS)
    params, faults = parse_sampling(fields)
    assert faults == []
    assert params is not None
    assert params.logit_bias == {3: -100.0, 4: 0.5}
    assert params.stop == ("\n", "END")
    assert params.stop_token_ids == (1, 2)
    assert (params.max_tokens, params.temperature, params.seed) == (7, 1.0, 2**63 - 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("top_logprobs", 21),
        ("top_logprobs", -1),
        ("top_logprobs", None),
        ("prompt_logprobs", 21),
        ("max_tokens", 32_769),
        ("max_tokens", 1.5),
        ("max_tokens", "7"),
        ("max_tokens", True),
        ("max_tokens", None),
        ("max_tokens", 10**30),
        ("min_tokens", -1),
        ("min_tokens", 257),
        ("temperature", -0.1),
        ("temperature", 101),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": math.nan}),
        ("logit_bias", {str(i): 0 for i in range(1025)}),
        ("logit_bias", [1]),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", "END"),
        ("stop", [""]),
        ("stop", ["x" * 257]),
        ("stop", ["x"] * 17),
        ("stop", [1]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [2**31]),
        ("stop_token_ids", list(range(17))),
        ("ignore_eos", 1),
        ("ignore_eos", "true"),
    ],
)
def test_a_value_out_of_its_limits_is_refused_by_field(field: str, value: object) -> None:
    (fault,) = faults_of({field: value})
    assert fault.startswith(f"sampling.{field}")
    assert "wanted" in fault


def test_unknown_and_unsupported_fields_are_errors_that_name_the_known_ones() -> None:
    found = faults_of({"best_of": 2, "temprature": 1.0, "n": 1})
    assert [fault.split(":")[0] for fault in found] == ["sampling.best_of", "sampling.temprature", "sampling.n"]
    assert all("temperature" in fault for fault in found)


def test_all_faults_come_at_once() -> None:
    assert len(faults_of({"max_tokens": 0, "top_p": 2, "seed": -1})) >= 3
    assert len(faults_of({"max_tokens": "x", "top_p": "y", "unknown": 1})) == 3


def test_a_fault_shows_at_most_a_piece_of_a_long_value() -> None:
    assert all(len(fault) < 400 for fault in faults_of({"stop": ["x" * 100_000], "n": "y" * 100_000}))


@settings(deadline=None)
@given(
    st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 32_768),
        temperature=st.floats(0, 100),
        top_k=st.none() | st.integers(1, 2**31 - 1),
        logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
        seed=st.none() | st.integers(0, 2**63 - 1),
        stop=st.lists(st.text(min_size=1, max_size=9), max_size=3).map(tuple),
    )
)
def test_what_is_within_the_limits_survives_json(params: SamplingParams) -> None:
    assert params.faults() == []
    assert parse_sampling(msgspec.json.decode(msgspec.json.encode(params))) == (params, [])
