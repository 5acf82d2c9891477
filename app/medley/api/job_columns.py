"""Many job bodies to the columns in which they are written, judged column by column.

A submit of 100,000 jobs must cost little more than its rows: a chunk is decoded in one call, each rule is one pass
over a column, sampling is judged once per distinct value and an adapter resolved once per name. Only a chunk in
which something is wrong is gone through job by job, to name each fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from uuid import UUID

import msgspec
from msgspec import UNSET

from medley.api.adapter_refs import Resolved
from medley.api.decoding import DECODE_ERRORS, Partial
from medley.api.errors import FaultList, TooLarge
from medley.api.job_bodies import (
    MAX_LABEL_CHARS,
    SAMPLING_NAMES,
    TOKEN_ID_BYTES,
    JobBody,
    decode_job,
    given,
    judge_sampling,
    label_faults,
    prompt_faults,
    sampling_json,
    sampling_key,
    seed_of,
    shown_value,
)
from medley.config import Limits
from medley.db.batches import JobColumns
from medley.spec.errors import Fault
from medley.spec.sampling import SEED_LIMIT

CHUNK_JOBS = 5_000  # jobs written by one statement

_decoder = msgspec.json.Decoder(JobBody)
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
        self.lanes: Counter[UUID | None] = Counter()  # revision -> jobs
        self._limits = limits
        self._resolve = resolve
        self._locate = locate
        self._resolved: dict[str | None, Resolved] = {None: Resolved("", None)}
        self._samplings: dict[Any, tuple[str, int, list[Fault]]] = {}
        self._custom_ids: set[str] = set()
        self._take_defaults(defaults)

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
        if len(bodies) == num_lines:
            return self._read(bodies, range(first_line, first_line + num_lines))
        lines = [(at, line) for at, line in enumerate(data.split(b"\n"), first_line) if line.strip()]
        return self._read_each(lines)

    def read_items(self, raws: Sequence[msgspec.Raw], first_index: int) -> list[JobColumns]:
        """Elements of a JSON array."""
        try:
            bodies = [_decoder.decode(raw) for raw in raws]
        except DECODE_ERRORS:
            return self._read_each(list(enumerate(raws, first_index)))
        return self._read(bodies, range(first_index, first_index + len(bodies)))

    def _read_each(self, items: Sequence[tuple[int, bytes | msgspec.Raw]]) -> list[JobColumns]:
        """The slow way, for a chunk in which something does not decode."""
        bodies, places = [], []
        for place, data in items:
            found = decode_job(data)
            self._add(place, found.faults)
            if found.value is None or found.faults:
                self.num_jobs += 1
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
        self.num_jobs += len(bodies)
        if self.num_jobs > self._limits.max_jobs_per_request:
            raise TooLarge(f"more than {self._limits.max_jobs_per_request} jobs, which is the limit of one request")
        parts = [slice(i, i + CHUNK_JOBS) for i in range(0, len(bodies), CHUNK_JOBS)]
        return [self._read_part(bodies[part], places[part]) for part in parts]

    def _read_part(self, bodies: list[Any], places: Sequence[int]) -> JobColumns:
        self._learn_adapters(bodies)
        keys = _hashable([sampling_key(body) for body in bodies])
        judged = {key: self._sampling(key) for key in set(keys)}
        samplings = [judged[key] for key in keys]
        if any(faults for _, _, faults in judged.values()) or not self._is_fit(bodies):
            for body, place in zip(bodies, places, strict=True):
                self._add(place, self._job_faults(body))
        default = self._resolved[self._adapter]
        refs = [default if body.adapter is UNSET else self._resolved[body.adapter] for body in bodies]
        revisions = [ref.revision for ref in refs]
        self.lanes.update(revisions)
        return JobColumns(
            prompts=[body.prompt for body in bodies],
            token_ids=[body.prompt_token_ids for body in bodies],
            revisions=revisions,
            adapters=[self._adapter if body.adapter is UNSET else body.adapter for body in bodies],
            samplings=[json for json, _, _ in samplings],
            max_tokens=[max_tokens for _, max_tokens, _ in samplings],
            seeds=[seed_of(body, self._seed) for body in bodies],
            custom_ids=[body.custom_id for body in bodies],
        )

    def _is_fit(self, bodies: list[Any]) -> bool:
        """Whether nothing but their sampling can be wrong with these. Adds their labels to those seen where so."""
        labels = [body.custom_id for body in bodies if body.custom_id is not None]
        distinct = set(labels)
        seeds = [body.seed for body in bodies if body.seed is not UNSET and body.seed is not None]
        fit = (
            self._are_prompts_fit(bodies)
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
        yield from label_faults("custom_id", body.custom_id)
        if body.custom_id is not None:
            if body.custom_id in self._custom_ids:
                got = f"{shown_value(body.custom_id)} again"
                yield Fault(field="custom_id", got=got, wanted="a custom_id once in a batch")
            self._custom_ids.add(body.custom_id)
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

    def _sampling(self, key: Any) -> tuple[str, int, list[Fault]]:
        """(JSON, max_tokens, faults) of a distinct set of sampling fields."""
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


def _hashable(keys: list[tuple[Any, ...]]) -> list[Any]:
    """`keys` with any logit_bias, the one field that is a dictionary, as a tuple of its items."""
    try:
        for key in keys:
            hash(key)
    except TypeError:
        return [tuple(_Bias(sorted(v.items())) if isinstance(v, dict) else v for v in key) for key in keys]
    return keys


class _Bias(tuple[tuple[int, float], ...]):
    """A logit_bias as dictionary keys want it."""


def _sampling_values(key: tuple[Any, ...]) -> dict[str, Any]:
    return {
        name: dict(value) if isinstance(value, _Bias) else value
        for name, value in zip(SAMPLING_NAMES, key, strict=True)
        if value is not UNSET
    }
