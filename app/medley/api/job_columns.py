"""Many job bodies to the columns in which they are written, judged column by column.

A submit of 100,000 jobs must cost little more than its rows: a chunk is decoded in one call, each rule is one pass
over a column, sampling is judged once per distinct value and an adapter resolved once per name. Only a chunk in
which something is wrong is gone through job by job, to name each fault.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from uuid import UUID

import msgspec
from msgspec import UNSET

from medley.api.adapter_refs import Resolved
from medley.api.decoding import DECODE_ERRORS, Partial, repeated_key
from medley.api.errors import FaultList, TooLarge
from medley.api.job_bodies import (
    MAX_LABEL_CHARS,
    SAMPLING_NAMES,
    TOKEN_ID_BYTES,
    JobBody,
    continuation_faults,
    decode_job,
    given,
    judge_sampling,
    label_faults,
    label_key,
    prompt_faults,
    sampling_json,
    sampling_key,
    seed_of,
    shown_value,
)
from medley.config import Limits
from medley.db.lanes import Lane
from medley.db.new_jobs import JobColumns
from medley.spec.errors import Fault
from medley.spec.grammars import schema_text
from medley.spec.sampling import SEED_LIMIT, sample_seed

CHUNK_JOBS = 5_000  # jobs written by one statement

_decoder = msgspec.json.Decoder(JobBody)
_encoder = msgspec.json.Encoder()
_BLANK_BEFORE_COLON = re.compile(rb'"[ \t\r\n]+:')
_SCHEMA_AT = SAMPLING_NAMES.index("json_schema")
Judged = tuple[str, int, list[Fault]]  # JSON, max_tokens and faults of one set of sampling fields
Resolve = Callable[[Iterable[str]], dict[str, Resolved]]
Locate = Callable[[int, Fault], Fault]


def at_line(line: int, fault: Fault) -> Fault:
    """A fault in line `line` of a file."""
    return msgspec.structs.replace(fault, line=line)


def at_item(index: int, fault: Fault) -> Fault:
    """A fault in `jobs[index]`."""
    return msgspec.structs.replace(fault, field=f"jobs[{index}].{fault.field}")


def at_top(_: int, fault: Fault) -> Fault:
    """A fault of the one job that a request is."""
    return fault


class JobReader:
    """Reads the jobs of one batch. `faults` grows; while it is empty, each chunk's columns are fit to be written.

    `locate` says where in the request a fault of the n-th job (or of line n) stands.
    """

    def __init__(self, defaults: Any, limits: Limits, resolve: Resolve, locate: Locate) -> None:
        self.faults = FaultList()
        self.num_jobs = 0
        self.num_bytes = 0  # of prompts
        self._num_by_revision: Counter[UUID | None] = Counter()
        self._names: dict[UUID | None, str | None] = {}  # revision -> the adapter, as it was first named
        self._limits = limits
        self._resolve = resolve
        self._locate = locate
        self._resolved: dict[str | None, Resolved] = {None: Resolved("", None)}
        self._samplings: dict[Any, Judged] = {}
        self._custom_ids: set[str | bytes] = set()  # as `label_key` has them
        self._take_defaults(defaults)

    @property
    def lanes(self) -> list[Lane]:
        """What the jobs that were read add to the batch's lanes."""
        return [Lane(revision, self._names[revision], num) for revision, num in self._num_by_revision.items()]

    def _take_defaults(self, defaults: Any) -> None:
        """What is wrong with the defaults is said once, and the jobs are judged without it."""
        faults: list[Fault] = []
        self._adapter: str | None = None if defaults.adapter is UNSET else defaults.adapter
        self._learn_adapters([])
        if wanted := self._resolved[self._adapter].wanted:
            faults.append(Fault(field="adapter", got=shown_value(self._adapter), wanted=wanted))
            self._adapter = None
        self._sampling_defaults = given(defaults)
        self._seed = seed_of(defaults, None)
        self._num_samples = 1 if defaults.n is UNSET else defaults.n
        _, found = judge_sampling(self._sampling_defaults | {"seed": self._seed})
        if found:
            self._sampling_defaults, self._seed = {}, None
        faults += found
        self.faults.extend(msgspec.structs.replace(f, field=f"defaults.{f.field}") for f in faults)

    def read_one(self, found: Partial[Any]) -> list[JobColumns]:
        """A body that was decoded by itself."""
        self._add(0, found.faults)
        if found.value is None or found.faults:
            self._judge_rest(0, found)
            return []
        return self._read([found.value], [0])

    def read_lines(self, data: bytes, first_line: int) -> list[JobColumns]:
        """Whole lines, a job each; blank ones are passed over."""
        num_lines = data.count(b"\n") + (not data.endswith(b"\n"))
        try:
            bodies = _decoder.decode_lines(data)
        except DECODE_ERRORS:
            bodies = []
        if len(bodies) == num_lines and not _repeats_a_key([data], bodies, data.splitlines):
            return self._read(bodies, range(first_line, first_line + num_lines))
        if not data.strip():
            return []
        lines = [(at, line) for at, line in enumerate(data.split(b"\n"), first_line) if line.strip()]
        return self._read_each(lines)

    def read_items(self, raws: Sequence[msgspec.Raw], first_index: int) -> list[JobColumns]:
        """Elements of a JSON array."""
        try:
            bodies = [_decoder.decode(raw) for raw in raws]
        except DECODE_ERRORS:
            return self._read_each(list(enumerate(raws, first_index)))
        if _repeats_a_key(raws, bodies, lambda: raws):
            return self._read_each(list(enumerate(raws, first_index)))
        return self._read(bodies, range(first_index, first_index + len(bodies)))

    def _read_each(self, items: Sequence[tuple[int, bytes | msgspec.Raw]]) -> list[JobColumns]:
        """The slow way, for a chunk in which something does not decode."""
        bodies, places = [], []
        for place, data in items:
            found = decode_job(data)
            self._add(place, found.faults)
            if found.value is None or found.faults:
                self._count(1)
                self._judge_rest(place, found)
            else:
                bodies.append(found.value)
                places.append(place)
        return self._read(bodies, places)

    def _judge_rest(self, place: int, found: Partial[Any]) -> None:
        """What else is wrong with a job of which some fields did not decode."""
        if found.value is not None:
            blind = found.bad | (
                {"prompt", "prompt_token_ids"} if found.bad & {"prompt", "prompt_token_ids"} else set()
            )
            self._learn_adapters([found.value])
            self._add(place, (f for f in self._job_faults(found.value) if f.field.partition("[")[0] not in blind))

    def _read(self, bodies: list[Any], places: Sequence[int]) -> list[JobColumns]:
        self._count(sum(self._samples_of(body) for body in bodies))
        parts = [slice(i, i + CHUNK_JOBS) for i in range(0, len(bodies), CHUNK_JOBS)]
        return [columns for part in parts for columns in self._read_part(bodies[part], places[part])]

    def _count(self, num_jobs: int) -> None:
        self.num_jobs += num_jobs
        if self.num_jobs > self._limits.max_jobs_per_request:
            raise TooLarge(f"more than {self._limits.max_jobs_per_request} jobs, which is the limit of one request")

    def _read_part(self, bodies: list[Any], places: Sequence[int]) -> Iterator[JobColumns]:
        self._learn_adapters(bodies)
        keys = _hashable([sampling_key(body) for body in bodies])
        judged = {key: self._sampling(key) for key in set(keys)}
        samplings = [judged[key] for key in keys]
        if any(faults for _, _, faults in judged.values()) or not self._is_fit(bodies):
            for body, place in zip(bodies, places, strict=True):
                self._add(place, self._job_faults(body))
        nums = [self._samples_of(body) for body in bodies]
        if max(nums, default=1) == 1:
            yield self._columns(bodies, samplings, [seed_of(body, self._seed) for body in bodies], None)
            return
        at = [i for i, num in enumerate(nums) for _ in range(num)]
        samples = [sample for num in nums for sample in range(num)]
        seeds = [seed_of(body, self._seed) for body in bodies]
        for start in range(0, len(at), CHUNK_JOBS):
            part, idx = at[start : start + CHUNK_JOBS], samples[start : start + CHUNK_JOBS]
            own = [None if (seed := seeds[i]) is None else sample_seed(seed, n) for i, n in zip(part, idx, strict=True)]
            yield self._columns([bodies[i] for i in part], [samplings[i] for i in part], own, idx)

    def _columns(
        self, bodies: list[Any], samplings: list[Judged], seeds: list[int | None], sample_idx: list[int] | None
    ) -> JobColumns:
        default = self._resolved[self._adapter]
        refs = [default if body.adapter is UNSET else self._resolved[body.adapter] for body in bodies]
        revisions = [ref.revision for ref in refs]
        adapters = [self._adapter if body.adapter is UNSET else body.adapter for body in bodies]
        self._num_by_revision.update(revisions)
        for name, revision in dict(zip(adapters, revisions, strict=True)).items():
            self._names.setdefault(revision, name)
        self.num_bytes += _prompt_bytes(bodies)
        has_scored = any(_is_scored(body) for body in bodies)
        return JobColumns(
            prompts=[body.prompt for body in bodies],
            token_ids=[body.prompt_token_ids for body in bodies],
            revisions=revisions,
            adapters=adapters,
            samplings=[json for json, _, _ in samplings],
            max_tokens=[0 if _is_scored(body) else most for body, (_, most, _) in zip(bodies, samplings, strict=True)],
            seeds=seeds,
            custom_ids=[body.custom_id for body in bodies],
            sample_idx=sample_idx,
            continuations=[body.continuation for body in bodies] if has_scored else None,
            continuation_token_ids=[body.continuation_token_ids for body in bodies] if has_scored else None,
            est_prompt_tokens=[_scored_tokens(body) for body in bodies] if has_scored else None,
        )

    def _samples_of(self, body: Any) -> int:
        """How many jobs the body asks for."""
        num: int = self._num_samples if body.n is UNSET else body.n
        return 1 if body.n is UNSET and _is_scored(body) else num

    def _is_fit(self, bodies: list[Any]) -> bool:
        """Whether nothing but their sampling can be wrong with these. Adds their labels to those seen where so."""
        labels = [body.custom_id for body in bodies if body.custom_id is not None]
        distinct = set(map(label_key, labels))
        seeds = [body.seed for body in bodies if body.seed is not UNSET and body.seed is not None]
        fit = (
            self._are_prompts_fit(bodies)
            and self._are_continuations_fit([body for body in bodies if _is_scored(body)])
            and all(self._resolved[name].wanted is None for name in {self._adapter_of(body) for body in bodies})
            and (not seeds or (min(seeds) >= 0 and max(seeds) < SEED_LIMIT))
            and len(distinct) == len(labels)
            and self._custom_ids.isdisjoint(distinct)
            and all(1 <= len(label) <= MAX_LABEL_CHARS for label in labels)
            and "\0" not in "".join(labels)
        )
        if fit:
            self._custom_ids |= distinct
        return fit

    def _are_prompts_fit(self, bodies: list[Any]) -> bool:
        texts = [body.prompt for body in bodies if body.prompt is not None]
        ids = [body.prompt_token_ids for body in bodies if body.prompt_token_ids is not None]
        if len(texts) + len(ids) != len(bodies):
            return False
        if len(ids) and any(body.prompt is not None and body.prompt_token_ids is not None for body in bodies):
            return False
        return self._are_fit(texts, ids)

    def _are_continuations_fit(self, bodies: list[Any]) -> bool:
        if not bodies:
            return True
        texts = [body.continuation for body in bodies if body.continuation is not None]
        ids = [body.continuation_token_ids for body in bodies if body.continuation_token_ids is not None]
        is_one_each = len(texts) + len(ids) == len(bodies)
        return is_one_each and self._are_fit(texts, ids) and all(self._samples_of(body) == 1 for body in bodies)

    def _are_fit(self, texts: list[str], ids: list[list[int]]) -> bool:
        most_bytes = self._limits.max_prompt_bytes
        # A character takes at most 4 bytes: only where that could matter are bytes counted.
        longest = max(map(len, texts), default=1)
        if longest * 4 > most_bytes and any(len(text.encode()) > most_bytes for text in texts):
            return False
        lens = list(map(len, ids))
        return (
            all(texts)
            and "\0" not in "".join(texts)
            and min(lens, default=1) >= 1
            and max(lens, default=1) <= most_bytes // TOKEN_ID_BYTES
        )

    def _job_faults(self, body: Any) -> Iterable[Fault]:
        """Every fault of one job whose fields decoded."""
        yield from prompt_faults(body.prompt, body.prompt_token_ids, self._limits)
        num_samples = self._samples_of(body)
        yield from continuation_faults(
            body.continuation, body.continuation_token_ids, self._limits, num_samples=num_samples
        )
        yield from label_faults("custom_id", body.custom_id)
        if body.custom_id is not None:
            if (key_of_label := label_key(body.custom_id)) in self._custom_ids:
                got = f"{shown_value(body.custom_id)} again"
                yield Fault(field="custom_id", got=got, wanted="a custom_id once in a batch")
            self._custom_ids.add(key_of_label)
        name = self._adapter_of(body)
        wanted = self._resolved[name].wanted
        if wanted is not None:
            yield Fault(field="adapter", got=shown_value(name), wanted=wanted)
        if body.seed is not UNSET and body.seed is not None and not 0 <= body.seed < SEED_LIMIT:
            yield Fault(field="seed", got=shown_value(body.seed), wanted="0 to 2**63 - 1")
        key = _hashable([sampling_key(body)])[0]
        yield from self._sampling(key)[2]

    def _adapter_of(self, body: Any) -> str | None:
        name: str | None = self._adapter if body.adapter is UNSET else body.adapter
        return name

    def _learn_adapters(self, bodies: list[Any]) -> None:
        names = {body.adapter for body in bodies if body.adapter is not UNSET} | {self._adapter}
        unknown = [name for name in names if name not in self._resolved and name is not None]
        if unknown:
            self._resolved.update(self._resolve(unknown))

    def _sampling(self, key: Any) -> Judged:
        """Of a distinct set of sampling fields."""
        found = self._samplings.get(key)
        if found is None:
            params, faults = judge_sampling(self._sampling_defaults | _sampling_values(key))
            found = (sampling_json(params), params.max_tokens, faults)
            if len(self._samplings) < CHUNK_JOBS:
                self._samplings[key] = found
            else:
                self._samplings = {key: found}
        return found

    def _add(self, place: int, faults: Iterable[Fault]) -> None:
        self.faults.extend(self._locate(place, fault) for fault in faults)


def _prompt_bytes(bodies: list[Any]) -> int:
    texts = "".join([body.prompt for body in bodies if body.prompt is not None])
    num_ids = sum([len(body.prompt_token_ids) for body in bodies if body.prompt_token_ids is not None])
    return (len(texts) if texts.isascii() else len(texts.encode())) + TOKEN_ID_BYTES * num_ids


def _repeats_a_key(
    sent: Sequence[bytes | msgspec.Raw], bodies: list[Any], parts: Callable[[], Sequence[bytes | msgspec.Raw]]
) -> bool:
    """Whether a field stands twice in one of the jobs `sent`, of which the decoder has kept the last.

    Keys are counted in what was sent and in what was kept; only where that differs (a null that was written out does
    it too) is each of `parts` gone through.
    """
    kept = _encoder.encode_lines(bodies)
    num_sent = sum(_num_keys(data) for data in sent)
    if num_sent == _num_keys(kept) and not any(_BLANK_BEFORE_COLON.search(data) for data in sent):
        return False
    return any(repeated_key(part) is not None for part in parts())


def _num_keys(data: bytes | msgspec.Raw) -> int:
    """Keys of JSON, where nothing stands between a key and its colon. A quote within a text has a backslash."""
    data = bytes(data)
    return data.count(b'":') - data.count(b'\\":')


def _is_scored(body: Any) -> bool:
    return body.continuation is not None or body.continuation_token_ids is not None


def _scored_tokens(body: Any) -> int | None:
    """About how many tokens a scoring job has, text at 4 bytes each; None for another job."""
    if not _is_scored(body):
        return None
    parts = ((body.prompt, body.prompt_token_ids), (body.continuation, body.continuation_token_ids))
    return sum(len(ids) if ids is not None else len(text or "") // 4 + 1 for text, ids in parts)


def _hashable(keys: list[tuple[Any, ...]]) -> list[Any]:
    """`keys` with what is a dictionary as what stands for it: the items of a logit_bias, the text of a schema."""
    try:
        for key in keys:
            hash(key)
    except TypeError:
        return [
            tuple(
                v if not isinstance(v, dict) else schema_text(v) if i == _SCHEMA_AT else _Bias(sorted(v.items()))
                for i, v in enumerate(key)
            )
            for key in keys
        ]
    return keys


class _Bias(tuple[tuple[int, float], ...]):
    """A logit_bias as dictionary keys want it."""


def _sampling_values(key: tuple[Any, ...]) -> dict[str, Any]:
    return {
        name: dict(value) if isinstance(value, _Bias) else value
        for name, value in zip(SAMPLING_NAMES, key, strict=True)
        if value is not UNSET
    }
