"""The body of a sweep: prompts, patterns, seeds and sampling, judged whole, and the digest that a resume compares."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from medley.api.decoding import DECODE_ERRORS, Data, decode_fields, repeated_key
from medley.api.errors import FaultList, InvalidRequest
from medley.api.job_bodies import (
    At,
    Priority,
    SamplingFields,
    TokenId,
    continuation_faults,
    given,
    judge_sampling,
    label_faults,
    prompt_faults,
    sampling_json,
    seed_of,
    shown_value,
)
from medley.config import Limits
from medley.spec.errors import Fault
from medley.spec.sampling import SEED_LIMIT

MAX_SEEDS = 1_000
MAX_PATTERNS = 1_000
MAX_PATTERN_CHARS = 300

# A name stands in URLs beside ids, so it has no slash; `_is_name` keeps it apart from ids.
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"


class PromptBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, gc=False):
    """One prompt. `adapter`: it runs on this adapter and the base alone. `expected`: what the answer must equal."""

    prompt: str | None = None
    prompt_token_ids: list[TokenId] | None = None
    expected: str | None = None
    custom_id: str | None = None
    adapter: str | None = None
    # Absent and not null where there is none: the digest of a sweep without them is what it was before there were any.
    continuation: str | UnsetType = UNSET
    continuation_token_ids: list[TokenId] | UnsetType = UNSET

    @property
    def scored(self) -> tuple[str | None, list[int] | None]:
        """What is to be scored: text, or token ids."""
        text, ids = self.continuation, self.continuation_token_ids
        return (None if text is UNSET else text), (None if ids is UNSET else ids)


# Prompts are decoded one by one, so that each fault is told with its place; what is described has them whole.
def _sweep_body(prompt: Any) -> Any:
    return msgspec.defstruct(
        "SweepRequest",
        [
            ("name", Annotated[str, msgspec.Meta(pattern=_NAME)]),
            ("prompts", list[prompt]),
            ("adapters", list[str], []),
            ("include_base", bool, False),
            ("seeds", list[int] | None, None),
            ("priority", Priority, "normal"),
            ("deadline_at", At | None, None),
        ],
        bases=(SamplingFields,),
        kw_only=True,
        forbid_unknown_fields=True,
        module=__name__,
    )


def _extension_body(prompt: Any) -> Any:
    return msgspec.defstruct(
        "ExtensionRequest",
        [
            ("prompts", list[prompt], []),
            ("adapters", list[str], []),
            ("include_base", bool, False),
            ("seeds", list[int], []),
        ],
        namespace={"__doc__": "What a sweep is to have as well; what it has already is no fault."},
        kw_only=True,
        forbid_unknown_fields=True,
        module=__name__,
    )


SweepBody, _RawSweepBody = _sweep_body(str | PromptBody), _sweep_body(msgspec.Raw)
ExtensionBody, _RawExtensionBody = _extension_body(str | PromptBody), _extension_body(msgspec.Raw)

_prompt_decoder = msgspec.json.Decoder(str | PromptBody)


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """A sweep as asked for. `seeds` None: one is drawn. `sampling` is JSON."""

    name: str
    prompts: list[PromptBody]
    patterns: list[str]
    include_base: bool
    seeds: list[int] | None
    sampling: str
    priority: str
    deadline_at: Any
    definition_sha256: bytes


@dataclass(frozen=True, kw_only=True)
class ExtensionRequest:
    prompts: list[PromptBody]
    patterns: list[str]
    include_base: bool
    seeds: list[int]


def read_extension(data: Data, limits: Limits) -> ExtensionRequest:
    """The extension in a body. Raises InvalidRequest with every fault that can be seen without the database."""
    found = decode_fields(data, _RawExtensionBody)
    faults = FaultList(found.faults)
    if found.value is None:
        raise InvalidRequest.of(faults)
    body = found.value
    prompts = _read_prompts(body.prompts, limits, faults)
    if not (body.prompts or body.adapters or body.include_base or body.seeds) and not faults:
        wanted = "prompts, adapters, include_base or seeds"
        faults.add(Fault(field="body", got="nothing to add", wanted=wanted))
    if body.seeds:
        faults.extend(_seed_list_faults(body.seeds))
    faults.extend(_pattern_list_faults(body.adapters))
    faults.raise_any()
    return ExtensionRequest(prompts=prompts, patterns=body.adapters, include_base=body.include_base, seeds=body.seeds)


def read_sweep(data: Data, limits: Limits) -> SweepRequest:
    """The sweep in a body. Raises InvalidRequest with every fault that can be seen without the database."""
    found = decode_fields(data, _RawSweepBody)
    faults = FaultList(found.faults)
    if found.value is None:
        raise InvalidRequest.of(faults)
    body = found.value
    prompts = _read_prompts(body.prompts, limits, faults)
    if not body.prompts:
        faults.add(Fault(field="prompts", got="no prompt", wanted="at least one"))
    faults.extend(_seed_faults(body.seeds, body))
    faults.extend(_pattern_faults(body))
    if body.name.startswith(("sweep_", "batch_")):
        faults.add(Fault(field="name", got=shown_value(body.name), wanted="a name that is not like an id"))
    params, wrong = judge_sampling(given(body) | {"seed": seed_of(body, None)})
    faults.extend(wrong)
    faults.raise_any()
    seeds = body.seeds if body.seeds is not None else None if params.seed is None else [params.seed]
    sampling = sampling_json(params)
    definition = [prompts, body.adapters, body.include_base, seeds, sampling]
    return SweepRequest(
        name=body.name,
        prompts=prompts,
        patterns=body.adapters,
        include_base=body.include_base,
        seeds=seeds,
        sampling=sampling,
        priority=body.priority,
        deadline_at=body.deadline_at,
        definition_sha256=hashlib.sha256(msgspec.json.encode(definition, order="deterministic")).digest(),
    )


def _read_prompts(raws: list[msgspec.Raw], limits: Limits, faults: FaultList) -> list[PromptBody]:
    """Those that could be read; what is wrong with them or the others is added to `faults`."""
    if len(raws) > limits.max_jobs_per_request:
        wanted = f"at most {limits.max_jobs_per_request}"
        raise InvalidRequest.of([Fault(field="prompts", got=f"{len(raws)} prompts", wanted=wanted)])
    prompts = [_read_prompt(raw, f"prompts[{i}]", faults) for i, raw in enumerate(raws)]
    _judge_prompts(prompts, limits, faults)
    return [prompt for prompt in prompts if prompt is not None]


def _read_prompt(raw: msgspec.Raw, at: str, faults: FaultList) -> PromptBody | None:
    try:
        value = _prompt_decoder.decode(raw)
        is_sound = isinstance(value, str) or repeated_key(raw) is None
    except DECODE_ERRORS:
        is_sound = False
    if not is_sound:
        found = decode_fields(raw, PromptBody)
        for fault in found.faults:
            field = at if fault.field == "body" else f"{at}.{fault.field}"
            faults.add(msgspec.structs.replace(fault, field=field))
        return None
    return PromptBody(prompt=value) if isinstance(value, str) else value


def _judge_prompts(prompts: list[PromptBody | None], limits: Limits, faults: FaultList) -> None:
    seen: set[str] = set()
    for i, prompt in enumerate(prompts):
        if prompt is None:
            continue
        found = [
            *prompt_faults(prompt.prompt, prompt.prompt_token_ids, limits),
            *continuation_faults(*prompt.scored, limits),
            *label_faults("custom_id", prompt.custom_id),
            *_expected_faults(prompt.expected, limits),
        ]
        if prompt.custom_id is not None:
            if prompt.custom_id in seen:
                got = f"{shown_value(prompt.custom_id)} again"
                found.append(Fault(field="custom_id", got=got, wanted="a custom_id once in a sweep"))
            seen.add(prompt.custom_id)
        faults.extend(msgspec.structs.replace(f, field=f"prompts[{i}].{f.field}") for f in found)


def _expected_faults(expected: str | None, limits: Limits) -> Iterable[Fault]:
    if expected is None:
        return
    if len(expected.encode()) > limits.max_prompt_bytes:
        yield Fault(field="expected", got="a longer text", wanted=f"at most {limits.max_prompt_bytes} bytes")
    if "\0" in expected:
        yield Fault(field="expected", got="a NUL character", wanted="text without NUL")


def _seed_faults(seeds: list[int] | None, body: Any) -> Iterable[Fault]:
    if seeds is None:
        return
    if seed_of(body, None) is not None:
        yield Fault(field="seeds", got="both", wanted="one of seed and seeds")
    yield from _seed_list_faults(seeds)


def _seed_list_faults(seeds: list[int]) -> Iterable[Fault]:
    if not 1 <= len(seeds) <= MAX_SEEDS or len(set(seeds)) != len(seeds):
        yield Fault(field="seeds", got=shown_value(seeds), wanted=f"1 to {MAX_SEEDS} distinct seeds")
    for i, seed in enumerate(seeds):
        if not 0 <= seed < SEED_LIMIT:
            yield Fault(field=f"seeds[{i}]", got=shown_value(seed), wanted="0 to 2**63 - 1")


def _pattern_faults(body: Any) -> Iterable[Fault]:
    if not body.adapters and not body.include_base:
        yield Fault(field="adapters", got="no pattern", wanted="at least one, or include_base")
    yield from _pattern_list_faults(body.adapters)


def _pattern_list_faults(patterns: list[str]) -> Iterable[Fault]:
    if len(patterns) > MAX_PATTERNS:
        yield Fault(field="adapters", got=f"{len(patterns)} patterns", wanted=f"at most {MAX_PATTERNS}")
    for i, pattern in enumerate(patterns):
        if not 1 <= len(pattern) <= MAX_PATTERN_CHARS:
            wanted = f"1 to {MAX_PATTERN_CHARS} characters"
            yield Fault(field=f"adapters[{i}]", got=f"{len(pattern)} characters", wanted=wanted)
