"""What a sweep is made of and may come to have: patterns to columns, prompts to rows, and what a definition adds.

A sweep keeps what it has. A definition of the same name that holds all of that is the same sweep, and what it holds
beyond that is added; one that lacks something is another sweep, which needs another name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import Connection, Row

from medley.api.auth import Caller
from medley.api.errors import Conflict, FaultList
from medley.api.job_bodies import shown_value
from medley.api.sweep_bodies import MAX_SEEDS, ExtensionRequest, PromptBody, SweepRequest
from medley.db.adapters import list_adapters
from medley.db.grants import list_shared
from medley.db.quotas import reserve
from medley.db.sweep_parts import (
    Extension,
    NotExtended,
    extend_sweep,
    is_known_definition,
    lock_sweep,
    read_prompts,
)
from medley.db.sweeps import SweepColumn, SweepPrompt, as_tuple, prompt_bytes, read_columns
from medley.db.tenants import Tenant
from medley.spec.errors import Fault
from medley.spec.ids import SWEEP, public_id

MAX_ADAPTERS = 100_000  # of one tenant, that patterns are matched against


def match_columns(
    conn: Connection,
    tenant: Tenant,
    patterns: Sequence[str],
    faults: FaultList,
    *,
    include_base: bool,
    known: Collection[str | None] = (),
) -> list[SweepColumn]:
    """The adapters that the patterns match, by name, at their newest revisions; then the base.

    known: columns that are there already (None: the base). They are left out, whatever has become of them since.
    """
    own = list_adapters(conn, limit=MAX_ADAPTERS) if patterns else []
    named = [(row.name, row) for row in own]
    # Others' adapters go by their whole name alone, so that a pattern without a tenant never takes them.
    shared = list_shared(conn, limit=MAX_ADAPTERS) if any("/" in pattern for pattern in patterns) else []
    named += [(f"{row.owner}/{row.name}", row) for row in shared]
    chosen: dict[str, SweepColumn] = {}
    for i, pattern in enumerate(patterns):
        matched = [(label, row) for label, row in named if _is_match(label, pattern, tenant)]
        if not matched and not any(label is not None and _is_match(label, pattern, tenant) for label in known):
            wanted = "a name or pattern that matches an adapter of yours, or one that is shared with you"
            faults.add(Fault(field=f"adapters[{i}]", got=shown_value(pattern), wanted=wanted))
        for label, row in matched:
            if label in known:
                continue
            if row.quarantined_at is not None:
                got = f"{label}, which is quarantined"
                wanted = "adapters whose newest revision is not; upload a corrected one"
                faults.add(Fault(field=f"adapters[{i}]", got=got, wanted=wanted))
            chosen[label] = SweepColumn(label, row.revision_id)
    base = [SweepColumn(None, None)] if include_base and None not in known else []
    return [chosen[name] for name in sorted(chosen)] + base


def _is_match(label: str, pattern: str, tenant: Tenant) -> bool:
    """label: `name` of the tenant's own adapter, `owner/name` of another's."""
    is_own = "/" not in label
    if is_own and fnmatchcase(label, pattern):
        return True
    return "/" in pattern and fnmatchcase(f"{tenant.name}/{label}" if is_own else label, pattern)


def resolve_prompts(
    bodies: Sequence[PromptBody], tenant: Tenant, columns: set[str | None], faults: FaultList
) -> list[SweepPrompt]:
    """Prompts as they are stored. One for an adapter that is no column is a fault."""
    prompts = []
    for i, body in enumerate(bodies):
        only = None if body.adapter is None else body.adapter.removeprefix(f"{tenant.name}/")
        if only is not None and only not in columns:
            wanted = "an adapter that the sweep's patterns match"
            faults.add(Fault(field=f"prompts[{i}].adapter", got=shown_value(body.adapter), wanted=wanted))
        continuation, continuation_ids = body.scored
        prompts.append(
            SweepPrompt(
                body.prompt,
                as_tuple(body.prompt_token_ids),
                body.expected,
                body.custom_id,
                only,
                continuation,
                as_tuple(continuation_ids),
            )
        )
    return prompts


def judge_size(num_cells: int, max_cells: int, *, low: int) -> None:
    """Raises InvalidRequest where one request asks for too many jobs, or for too few."""
    faults = FaultList()
    if not low <= num_cells <= max_cells:
        faults.add(Fault(field="prompts", got=f"{num_cells} jobs in all", wanted=f"{low} to {max_cells}"))
    faults.raise_any()


def declare_again(conn: Connection, who: Caller, existing: Row[Any], asked: SweepRequest, max_cells: int) -> int:
    """The sweep `existing` declared once more. Returns how many cells that adds.

    Raises Conflict where the definition lacks something that the sweep has, or samples otherwise.
    """
    if is_known_definition(existing, asked.definition_sha256):
        return 0
    sweep = lock_sweep(conn, existing.id)
    columns = [SweepColumn(row.adapter, row.revision_id) for row in read_columns(conn, sweep.id)]
    prompts = read_prompts(conn, sweep.id)
    lacks = _lacks(sweep, prompts, columns, asked, who.tenant)
    if lacks:
        raise Conflict(
            f"the sweep {asked.name!r} exists with another definition: this one has {', and '.join(lacks)};"
            " declare all that it has, and more, to extend it, or take another name"
        )
    extension = _extension(conn, who.tenant, sweep, prompts, columns, asked)
    return _extend(conn, who, sweep, extension, max_cells)


def add_to_sweep(conn: Connection, who: Caller, sweep_id: UUID, asked: ExtensionRequest, max_cells: int) -> int:
    """Adds to the sweep what it has not. Returns how many cells that are."""
    sweep = lock_sweep(conn, sweep_id)
    columns = [SweepColumn(row.adapter, row.revision_id) for row in read_columns(conn, sweep.id)]
    extension = _extension(conn, who.tenant, sweep, read_prompts(conn, sweep.id), columns, asked)
    return _extend(conn, who, sweep, extension, max_cells)


def _lacks(
    sweep: Row[Any], prompts: list[SweepPrompt], columns: list[SweepColumn], asked: SweepRequest, tenant: Tenant
) -> list[str]:
    """What stands between the definition and one that holds all that the sweep has."""
    found = []
    if sweep.sampling != msgspec.json.decode(asked.sampling):
        found.append("other sampling")
    declared = Counter(resolve_prompts(asked.prompts, tenant, {c.adapter for c in columns}, FaultList()))
    if num := (Counter(prompts) - declared).total():
        found.append(f"not {num} of its prompts")
    for column in columns:
        if column.adapter is None and not asked.include_base:
            found.append("not the base")
        elif column.adapter is not None and not any(_is_match(column.adapter, p, tenant) for p in asked.patterns):
            found.append(f"not its adapter {column.adapter}")
    if asked.seeds is not None and (missing := [seed for seed in sweep.seeds if seed not in asked.seeds]):
        found.append(f"not its seed{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:5]))}")
    return found[:5]


def _extension(
    conn: Connection,
    tenant: Tenant,
    sweep: Row[Any],
    prompts: list[SweepPrompt],
    columns: list[SweepColumn],
    asked: SweepRequest | ExtensionRequest,
) -> Extension:
    """What of `asked` the sweep has not. Raises InvalidRequest."""
    faults = FaultList()
    names = {column.adapter for column in columns}
    new_columns = match_columns(conn, tenant, asked.patterns, faults, include_base=asked.include_base, known=names)
    wanted = resolve_prompts(asked.prompts, tenant, names | {c.adapter for c in new_columns}, faults)
    left = Counter(prompts)
    new_prompts = []
    for prompt in wanted:
        if left[prompt] > 0:
            left[prompt] -= 1
        else:
            new_prompts.append(prompt)
    _judge_labels(prompts, new_prompts, faults)
    seeds = [seed for seed in asked.seeds or [] if seed not in sweep.seeds]
    if len(sweep.seeds) + len(seeds) > MAX_SEEDS:
        got = f"{len(sweep.seeds) + len(seeds)} in all"
        faults.add(Fault(field="seeds", got=got, wanted=f"1 to {MAX_SEEDS} distinct seeds"))
    faults.raise_any()
    digest = asked.definition_sha256 if isinstance(asked, SweepRequest) else None
    return Extension(new_prompts, new_columns, seeds, digest)


def _judge_labels(prompts: list[SweepPrompt], new: list[SweepPrompt], faults: FaultList) -> None:
    labels = {prompt.custom_id for prompt in prompts} - {None}
    for prompt in new:
        if prompt.custom_id in labels:
            got = f"{shown_value(prompt.custom_id)}, which another prompt of the sweep has"
            faults.add(Fault(field="prompts.custom_id", got=got, wanted="a custom_id once in a sweep"))


def _extend(conn: Connection, who: Caller, sweep: Row[Any], extension: Extension, max_cells: int) -> int:
    try:
        num_new = extend_sweep(conn, sweep, extension)
    except NotExtended as error:
        raise Conflict(f"the sweep {sweep.name!r} is not extended: {error}") from error
    judge_size(num_new, max_cells, low=0)
    if not extension.is_empty:
        who.note(conn, "sweep.extend", public_id(SWEEP, sweep.id), num_jobs=num_new)
        num_bytes = prompt_bytes(extension.prompts)
        reserve(conn, who.tenant.id, who.tenant.quotas, sweep.id, num_jobs=num_new, num_bytes=num_bytes)
    return num_new
