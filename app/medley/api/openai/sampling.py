"""From a request's body to the sampling of its jobs: OpenAI's fields, and vLLM's for what OpenAI has not.

Owns which of the service's own fields each means; the values are judged where all sampling is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from medley.api.decoding import MAX_SHOWN
from medley.api.job_bodies import judge_sampling
from medley.api.openai.bodies import ChatBody, CompletionBody
from medley.spec.errors import Fault
from medley.spec.sampling import SEED_LIMIT, SamplingParams

# What OpenAI documents where a field is left out. A chat's answer may be as long as the model allows.
DEFAULT_TEMPERATURE = 1.0
DEFAULT_MAX_TOKENS = 16

_ANY_OBJECT: dict[str, Any] = {"type": "object"}
_AS_THEY_ARE = (
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
)


def sampling_of(body: CompletionBody | ChatBody, faults: list[Fault], *, max_chat_tokens: int) -> SamplingParams:
    """The sampling without the seed; what is wrong with it is added to `faults`, by the body's own names."""
    values: dict[str, Any] = {
        "max_tokens": _max_tokens(body, faults, max_chat_tokens),
        "temperature": DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
        "stop": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        # vLLM's clients say 0 or -1 for all.
        "top_k": None if body.top_k in (0, -1) else body.top_k,
        "stop_token_ids": tuple(body.stop_token_ids or ()),
    }
    for name in _AS_THEY_ARE:
        if (value := getattr(body, name)) is not None:
            values[name] = value
    values |= _logprobs(body, faults)
    grammar, names = _grammar(body, faults)
    if isinstance(body, CompletionBody):
        names["top_logprobs"] = "logprobs"
    params, found = judge_sampling(values | grammar)
    faults += (_renamed(fault, names) for fault in found if not _is_said_twice(fault, body))
    if body.seed is not None and not 0 <= body.seed < SEED_LIMIT:
        faults.append(Fault(field="seed", got=str(body.seed)[:MAX_SHOWN], wanted="0 to 2**63 - 1"))
    return params


def _max_tokens(body: CompletionBody | ChatBody, faults: list[Fault], max_chat_tokens: int) -> int:
    if isinstance(body, CompletionBody):
        return DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    given = {num for num in (body.max_tokens, body.max_completion_tokens) if num is not None}
    if len(given) > 1:
        faults.append(Fault(field="max_tokens", got="both", wanted="one of max_tokens and max_completion_tokens"))
    return next(iter(given), max_chat_tokens)


def _logprobs(body: CompletionBody | ChatBody, faults: list[Fault]) -> dict[str, Any]:
    """Sampling fields for the log-probabilities that are asked for: with echo the prompt's too."""
    if isinstance(body, CompletionBody):
        if body.logprobs is None:
            return {}
        return {"top_logprobs": body.logprobs} | ({"prompt_logprobs": body.logprobs} if body.echo else {})
    if body.top_logprobs is not None and not body.logprobs:
        got = str(body.top_logprobs)[:MAX_SHOWN]
        faults.append(Fault(field="top_logprobs", got=got, wanted="null, or logprobs: true beside it"))
    return {"top_logprobs": body.top_logprobs or 0} if body.logprobs else {}


def _grammar(body: CompletionBody | ChatBody, faults: list[Fault]) -> tuple[dict[str, Any], dict[str, str]]:
    """(sampling fields for what the text must be, the names by which the body has them)."""
    form, outputs = body.response_format, body.structured_outputs
    if form is not None and (form.type == "json_schema") != (form.json_schema is not None):
        got = "nothing" if form.json_schema is None else f"a schema beside the type {form.type}"
        wanted = "a schema with the type json_schema, and none else"
        faults.append(Fault(field="response_format.json_schema", got=got, wanted=wanted))
        return {}, {}
    is_free = form is None or form.type == "text"
    if outputs is None:
        if form is None or is_free:
            return {}, {}
        if form.json_schema is None:
            return {"json_schema": _ANY_OBJECT}, {}
        return {"json_schema": form.json_schema.schema}, {"json_schema": "response_format.json_schema.schema"}
    if not is_free:
        faults.append(Fault(field="structured_outputs", got="both", wanted="null beside response_format"))
        return {}, {}
    given = {"json_schema": outputs.json, "regex": outputs.regex, "choice": outputs.choice}
    found = {name: value for name, value in given.items() if value is not None}
    if not found or found.get("choice") == []:
        wanted = "one of json, regex and choice"
        faults.append(Fault(field="structured_outputs", got="nothing that the text must be", wanted=wanted))
    return found, {name: f"structured_outputs.{name.removesuffix('_schema')}" for name in given}


def _is_said_twice(fault: Fault, body: CompletionBody | ChatBody) -> bool:
    """With echo a completion's one field `logprobs` is two of sampling."""
    return isinstance(body, CompletionBody) and fault.field == "prompt_logprobs"


def _renamed(fault: Fault, names: Mapping[str, str]) -> Fault:
    """The fault of a sampling field, by the name that the body has for it."""
    field, bracket, rest = fault.field.partition("[")
    return msgspec.structs.replace(fault, field=f"{names.get(field, field)}{bracket}{rest}")
