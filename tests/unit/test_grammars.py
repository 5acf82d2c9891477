"""Structured output is judged by size, form and depth before anything is compiled from it."""

from __future__ import annotations

from typing import Any

import pytest

from medley.spec.grammars import MAX_CHOICES, MAX_REGEX_BYTES, MAX_SCHEMA_BYTES, Grammar
from medley.spec.sampling import SamplingParams, parse_sampling


def faults_of(**fields: Any) -> list[str]:
    params, faults = parse_sampling(fields)
    assert (params is None) == bool(faults)
    return [str(fault) for fault in faults]


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def test_a_schema_is_kept_as_text_with_its_properties_in_order_given_as_object_or_as_text() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    params, _ = parse_sampling({"json_schema": schema})
    assert params is not None
    assert params.grammar == Grammar("json_schema", '{"type":"object","properties":{"b":{},"a":{}}}')
    again, _ = parse_sampling({"json_schema": params.json_schema})
    assert again == params == SamplingParams(json_schema=schema)


def test_a_regex_and_a_choice_are_grammars_and_nothing_is_none() -> None:
    assert SamplingParams(regex="a+").grammar == Grammar("regex", "a+")
    assert SamplingParams(choice=["yes", "né"]).grammar == Grammar("choice", '["yes","né"]')  # type: ignore[arg-type]
    assert SamplingParams().grammar is None


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"json_schema": "{"}, "json_schema"),
        ({"json_schema": "[1]"}, "json_schema"),
        ({"json_schema": 5}, "json_schema"),
        ({"json_schema": {"x": "y" * MAX_SCHEMA_BYTES}}, "json_schema"),
        ({"json_schema": nested(33)}, "json_schema"),
        ({"json_schema": "[" * 60_000}, "json_schema"),
        ({"json_schema": {"pattern": "a\0"}}, None),  # escaped, it is harmless
        ({"regex": ""}, "regex"),
        ({"regex": "a" * (MAX_REGEX_BYTES + 1)}, "regex"),
        ({"regex": "a\0b"}, "regex"),
        ({"regex": "\ud800"}, "regex"),
        ({"choice": "yes"}, "choice"),
        ({"choice": ["", "no"]}, "choice[0]"),
        ({"choice": ["x"] * (MAX_CHOICES + 1)}, "choice"),
        ({"choice": ["x" * 70_000]}, "choice"),
        ({"regex": "a", "choice": ["a"]}, "regex"),
        ({"regex": "a", "min_tokens": 1}, "min_tokens"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_cannot_be_a_grammar_is_a_fault_of_its_field(fields: dict[str, Any], field: str | None) -> None:
    found = faults_of(**fields)
    assert len(found) == (field is not None)
    if field is not None:
        assert found[0].startswith(f"sampling.{field}: ")


def test_a_prompt_alone_may_be_scored() -> None:
    assert faults_of(max_tokens=0, prompt_logprobs=0) == []
    assert len(faults_of(max_tokens=0)) == 1
    assert faults_of(max_tokens=-1, prompt_logprobs=3)
