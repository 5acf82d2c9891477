"""The body of one job: its fields, and what must hold of their values beyond their types.

Owns the rules for prompts, labels and sampling; `job_columns` applies them to thousands of jobs at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from hashlib import blake2b
from operator import attrgetter
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from medley.api.decoding import MAX_SHOWN, Data, Partial, decode_fields
from medley.config import Limits
from medley.spec.errors import Fault
from medley.spec.sampling import MAX_SAMPLES, SamplingParams

MAX_LABEL_CHARS = 200  # of custom_id, and of names
SHORT_LABEL_CHARS = 40  # a digest takes hardly less; a longer one may take 800 bytes, and a request has a million
TOKEN_ID_BYTES = 4  # a prompt of ids counts as many bytes towards the limit on prompts

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Priority = Annotated[str, msgspec.Meta(pattern="^(low|normal|high)$")]
NumSamples = Annotated[int, msgspec.Meta(ge=1, le=MAX_SAMPLES)]
At = Annotated[datetime, msgspec.Meta(tz=True)]

SEED = "seed"
_SAMPLING = tuple(f for f in msgspec.structs.fields(SamplingParams) if f.name != SEED)
SAMPLING_NAMES = tuple(f.name for f in _SAMPLING)

# Flat sampling fields, taken from SamplingParams so that the two cannot drift; absent is not null here.
_sampling_fields: list[tuple[str, Any, Any]] = [(f.name, f.type | UnsetType, UNSET) for f in _SAMPLING]
_options: dict[str, Any] = {"kw_only": True, "forbid_unknown_fields": True, "module": __name__}

# Any is what defstruct can promise: the fields of the four bodies are listed here.
SamplingFields: Any = msgspec.defstruct(
    "SamplingFields", [*_sampling_fields, (SEED, int | None | UnsetType, UNSET)], **_options
)
# `adapter`: absent takes the batch's default, null is the base. `n`: so many jobs of the one prompt.
Defaults: Any = msgspec.defstruct(
    "Defaults",
    [("adapter", str | None | UnsetType, UNSET), ("n", NumSamples | UnsetType, UNSET)],
    bases=(SamplingFields,),
    **_options,
)
JobBody: Any = msgspec.defstruct(
    "JobBody",
    [
        ("prompt", str | None, None),
        ("prompt_token_ids", list[TokenId] | None, None),
        ("custom_id", str | None, None),
        # One of them makes it a scoring job.
        ("continuation", str | None, None),
        ("continuation_token_ids", list[TokenId] | None, None),
    ],
    bases=(Defaults,),
    gc=False,  # bodies hold no cycles, and there may be a million
    omit_defaults=True,  # so that what was sent can be told from what was not
    **_options,
)
# A job by itself carries what else its batch would.
SingleJob: Any = msgspec.defstruct(
    "SingleJob",
    [("priority", Priority, "normal"), ("deadline_at", At | None, None)],
    bases=(JobBody,),
    **_options,
)

sampling_key = attrgetter(*SAMPLING_NAMES)

_ON_BATCH = "no such field of a job in a batch: set it on the batch"
SAMPLES_ELSEWHERE = "1: several samples of one prompt are a batch (POST /v1/batches)"
_OF_BATCH = {"priority": _ON_BATCH, "deadline_at": _ON_BATCH, "sampling": "its fields beside prompt, not nested"}


def decode_job(data: Data) -> Partial[Any]:
    """One job of a batch."""
    return decode_fields(data, JobBody, unknown=_OF_BATCH)


def prompt_faults(prompt: str | None, token_ids: list[int] | None, limits: Limits) -> Iterator[Fault]:
    """What is wrong with a prompt given as text or as ids."""
    if (prompt is None) == (token_ids is None):
        got = "neither" if prompt is None else "both"
        yield Fault(field="prompt", got=got, wanted="one of prompt and prompt_token_ids")
    yield from _text_faults("prompt", prompt, token_ids, limits)


def continuation_faults(
    continuation: str | None, token_ids: list[int] | None, limits: Limits, *, num_samples: int = 1
) -> Iterator[Fault]:
    """What is wrong with what is to be scored, where there is such a thing."""
    if continuation is not None and token_ids is not None:
        yield Fault(field="continuation", got="both", wanted="one of continuation and continuation_token_ids")
    yield from _text_faults("continuation", continuation, token_ids, limits)
    if num_samples > 1 and (continuation is not None or token_ids is not None):
        yield Fault(field="n", got=str(num_samples), wanted="1: a continuation has one score")


def _text_faults(field: str, text: str | None, token_ids: list[int] | None, limits: Limits) -> Iterator[Fault]:
    if text is not None:
        num_bytes = len(text.encode())
        if not 1 <= num_bytes <= limits.max_prompt_bytes:
            wanted = f"1 to {limits.max_prompt_bytes} bytes of UTF-8"
            yield Fault(field=field, got=f"{num_bytes} bytes", wanted=wanted)
        if "\0" in text:
            yield Fault(field=field, got="a NUL character", wanted="text without NUL")
    most_ids = limits.max_prompt_bytes // TOKEN_ID_BYTES
    if token_ids is not None and not 1 <= len(token_ids) <= most_ids:
        yield Fault(field=f"{field}_token_ids", got=f"{len(token_ids)} ids", wanted=f"1 to {most_ids} ids")


def label_key(label: str) -> str | bytes:
    """What tells a label from others at next to no memory: itself, or a digest of a long one."""
    if len(label) <= SHORT_LABEL_CHARS and label.isascii():
        return label
    return blake2b(label.encode(errors="surrogatepass"), digest_size=16).digest()


def label_faults(field: str, label: str | None) -> Iterator[Fault]:
    """What is wrong with a short text that the tenant chose."""
    if label is None:
        return
    if not 1 <= len(label) <= MAX_LABEL_CHARS:
        yield Fault(field=field, got=f"{len(label)} characters", wanted=f"1 to {MAX_LABEL_CHARS} characters")
    if "\0" in label:
        yield Fault(field=field, got="a NUL character", wanted="text without NUL")


def given(fields: Any, names: tuple[str, ...] = SAMPLING_NAMES) -> dict[str, Any]:
    """Those of `names` that were sent."""
    return {name: value for name in names if (value := getattr(fields, name)) is not UNSET}


def judge_sampling(values: Mapping[str, Any]) -> tuple[SamplingParams, list[Fault]]:
    """Sampling of typed values, with every fault; fields are named flat, as they were sent."""
    params = SamplingParams(**values)
    faults = [msgspec.structs.replace(f, field=f.field[1:]) for f in params.faults("")]
    faults += [
        Fault(field="stop", got="a NUL character", wanted="text without NUL") for text in params.stop if "\0" in text
    ]
    return params, faults


def sampling_json(params: SamplingParams) -> str:
    """As it is stored: without the seed, which has a column, and always with max_tokens, which SQL reads."""
    fields = msgspec.to_builtins(msgspec.structs.replace(params, seed=None), str_keys=True)
    return msgspec.json.encode({"max_tokens": params.max_tokens, **fields}).decode()


def seed_of(fields: Any, default: int | None) -> int | None:
    """The seed of a body, else the batch's; None draws one."""
    return default if fields.seed is UNSET else fields.seed


def shown_value(value: object) -> str:
    return repr(value)[:MAX_SHOWN]
