"""The client: submit, follow, sweep. One sync class over one connection pool."""

from __future__ import annotations

import operator
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any, Self

import msgspec

from medley.client.adapters import Adapters
from medley.client.batches import Batch
from medley.client.jobs import Job
from medley.client.keys import Keys
from medley.client.sweeps import Sweep, prompt_rows
from medley.client.transport import Transport, decode, segment
from medley.client.types import AuditEntry, BatchStatus, JobStatus, Limits, Result, UsageReport, WorkerStatus
from medley.client.webhooks import Webhooks

JobFields = Mapping[str, Any]  # prompt or prompt_token_ids, adapter, custom_id, and sampling fields
AUDIT_PAGE = 1_000
LINES_FROM = 2_000  # jobs from which a batch travels as a JSONL stream instead of one JSON body


class _Workers(msgspec.Struct):
    workers: list[WorkerStatus]


class _Tenant(msgspec.Struct):
    name: str


class _Audit(msgspec.Struct):
    entries: list[AuditEntry]
    next: int | None = None


class _Batches(msgspec.Struct):
    batches: list[BatchStatus]
    next: str | None = None


class Client:
    """A tenant's connection to the service at `base_url`. Close it, or use it as a context manager.

    timeout: seconds one request may take. retries: of requests that did not get through (all creates carry an
    idempotency key, so a retry never makes a second job). Safe to use from several threads. Raises ValueError for a
    URL or a key that cannot be one.
    """

    def __init__(self, base_url: str, api_key: str, *, timeout: float = 90.0, retries: int = 6) -> None:
        self._transport = Transport(base_url, api_key, timeout_s=timeout, retries=retries)
        self.adapters = Adapters(self._transport)
        self.keys = Keys(self._transport)
        self.webhooks = Webhooks(self._transport)

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: str | None = None,
        continuation: str | Sequence[int] | None = None,
        custom_id: str | None = None,
        priority: str | None = None,
        deadline_at: datetime | None = None,
        idempotency_key: str | None = None,
        **sampling: Any,
    ) -> Job:
        """Submits one job: a prompt as text or token ids, an adapter's name (None: the base model), sampling fields.

        continuation: text or token ids that are scored given the prompt; nothing is generated then, and the result
        has a `score`. Among the sampling fields are top_logprobs and prompt_logprobs, and json_schema, regex or
        choice for what the text must be. On return the job is durable. Raises InvalidRequest with every fault.
        """
        body = _job_fields(prompt, adapter, custom_id) | _either("continuation", continuation) | sampling
        body |= _present(priority=priority, deadline_at=deadline_at)
        return Job(self._transport, self._transport.post(JobStatus, "/v1/jobs", body, key=_key(idempotency_key)))

    def submit_many(
        self,
        jobs: Iterable[JobFields | str],
        *,
        name: str | None = None,
        adapter: str | None = None,
        priority: str | None = None,
        deadline_at: datetime | None = None,
        idempotency_key: str | None = None,
        **sampling: Any,
    ) -> Batch:
        """Submits many jobs as one batch: all are queued, or none and InvalidRequest lists every fault.

        Each is a prompt, or a mapping of prompt (or prompt_token_ids), continuation (or continuation_token_ids) for
        what is only to be scored, adapter, custom_id and sampling fields; `adapter` and `sampling` given here are the
        defaults. n=3 makes three jobs of each prompt, told apart by `sample_idx`, with seeds of their own.
        """
        if isinstance(jobs, str):
            raise TypeError("jobs: got one text, wanted several; Client.submit takes one")
        rows = [{"prompt": job} if isinstance(job, str) else dict(job) for job in jobs]
        defaults = _present(adapter=adapter) | sampling
        key = _key(idempotency_key)
        options = _present(name=name, priority=priority, deadline_at=deadline_at)
        if len(rows) < LINES_FROM:
            body = options | {"defaults": defaults, "jobs": rows}
            return Batch(self._transport, self._transport.post(BatchStatus, "/v1/batches", body, key=key))
        return self._submit_lines(lambda: map(msgspec.json.encode, rows), options, defaults, key)

    def submit_file(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        adapter: str | None = None,
        priority: str | None = None,
        deadline_at: datetime | None = None,
        idempotency_key: str | None = None,
        **sampling: Any,
    ) -> Batch:
        """Submits a JSONL file, a job a line as in `submit_many`, streamed from disk as it is.

        Raises InvalidRequest with the faults of every line; then nothing is queued.
        """

        def lines() -> Iterator[bytes]:
            with Path(path).open("rb") as file:
                while chunk := file.read(1 << 20):
                    yield chunk

        defaults = _present(adapter=adapter) | sampling
        options = _present(name=name, priority=priority, deadline_at=deadline_at)
        status = self._post_lines(lines, options, defaults, _key(idempotency_key))
        return Batch(self._transport, status)

    def sweep(
        self,
        name: str,
        prompts: Sequence[str | JobFields],
        *,
        adapters: Sequence[str] = (),
        expected: Sequence[str] | None = None,
        include_base: bool = False,
        seeds: Sequence[int] | None = None,
        priority: str | None = None,
        deadline_at: datetime | None = None,
        **sampling: Any,
    ) -> Sweep:
        """Declares prompts x adapters as one durable job; the service expands it. The same call again resumes it,
        and one with more prompts, adapters or seeds adds what is missing.

        prompts: texts, or mappings of prompt (or prompt_token_ids), continuation (or continuation_token_ids) for what
        is only to be scored, expected, custom_id, and adapter for a prompt that concerns one adapter (and the base)
        alone. adapters: names and patterns such as "acme/*". expected:
        what each prompt's answer must equal, in the order of `prompts`. include_base: the base model as a column.
        Raises Conflict where the sweep of that name has something that this call lacks, or other sampling.
        """
        body: dict[str, Any] = {
            "name": name,
            "prompts": prompt_rows(prompts, expected),
            "adapters": [adapters] if isinstance(adapters, str) else list(adapters),
            "include_base": include_base,
        }
        body |= _present(seeds=seeds, priority=priority, deadline_at=deadline_at) | sampling
        headers = {"Content-Type": "application/json", "Idempotency-Key": _key(None)}
        response = self._transport.request("POST", "/v1/sweeps", content=msgspec.json.encode(body), headers=headers)
        return Sweep(self._transport, decode(BatchStatus, response), is_resumed=response.status_code == 200)

    def job(self, job_id: str) -> Job:
        """The job of that id. Raises NotFound."""
        return Job(self._transport, self._transport.get(JobStatus, f"/v1/jobs/{segment(job_id)}"))

    def batch(self, batch_id: str) -> Batch:
        """The batch (or sweep) of that id. Raises NotFound."""
        return Batch(self._transport, self._transport.get(BatchStatus, f"/v1/batches/{segment(batch_id)}"))

    def get_sweep(self, name_or_id: str) -> Sweep:
        """The sweep of that id or name. Raises NotFound."""
        status = self._transport.get(BatchStatus, f"/v1/sweeps/{segment(name_or_id)}")
        return Sweep(self._transport, status, is_resumed=True)

    def find(self, target: str) -> Batch:
        """A batch by its id, or a sweep by its id or name. Raises NotFound."""
        return self.batch(target) if target.startswith("batch_") else self.get_sweep(target)

    def batches(self, *, limit: int = 50) -> list[BatchStatus]:
        """The newest batches and sweeps."""
        return self._transport.get(_Batches, "/v1/batches", {"limit": limit}).batches

    def results(
        self,
        batch: Batch | str,
        *,
        after: int = 0,
        follow: bool = True,
        include_tokens: bool = False,
        latest: bool = False,
        timeout: float | None = None,
    ) -> Iterator[Result]:
        """The results of a batch or sweep (itself, its id, or a sweep's name) as they finish: see `Batch.results`."""
        handle = batch if isinstance(batch, Batch) else self.find(batch)
        return handle.results(after=after, follow=follow, include_tokens=include_tokens, latest=latest, timeout=timeout)

    def cancel(self, target: Job | Batch | str) -> JobStatus | BatchStatus:
        """Cancels a job, a batch or a sweep: itself, its id, or a sweep's name. What has ended stays as it is."""
        if isinstance(target, str):
            target = self.job(target) if target.startswith("job_") else self.find(target)
        return target.cancel()

    def usage(self, first: date | None = None, last: date | None = None, *, by: str = "day") -> UsageReport:
        """Jobs and tokens that workers did for the tenant on the days (UTC) `first` to `last`, the last 30 by default.

        by: "day", "adapter" or "revision".
        """
        params = {"from": first and first.isoformat(), "to": last and last.isoformat(), "by": by}
        return self._transport.get(UsageReport, "/v1/usage", params)

    def workers(self) -> list[WorkerStatus]:
        """The pool's workers and what their engines have done."""
        return self._transport.get(_Workers, "/v1/workers").workers

    def tenant(self) -> str:
        """The name of the key's tenant."""
        return self._transport.get(_Tenant, "/v1/tenant").name

    def limits(self) -> Limits:
        """What the key's tenant may have, and what it has."""
        return self._transport.get(Limits, "/v1/limits")

    def audit(self, *, limit: int | None = None) -> Iterator[AuditEntry]:
        """What was changed by hand, newest first: all, or the newest `limit`. It takes a key with the scope admin."""
        before: int | None = None
        while limit is None or limit > 0:
            size = AUDIT_PAGE if limit is None else min(limit, AUDIT_PAGE)
            page = self._transport.get(_Audit, "/v1/audit", {"before": before, "limit": size})
            yield from page.entries
            if page.next is None:
                return
            before = page.next
            limit = None if limit is None else limit - len(page.entries)

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _submit_lines(
        self, lines: Callable[[], Iterable[bytes]], options: JobFields, defaults: JobFields, key: str
    ) -> Batch:
        return Batch(self._transport, self._post_lines(lambda: _joined(lines()), options, defaults, key))

    def _post_lines(
        self, lines: Callable[[], Iterable[bytes]], options: JobFields, defaults: JobFields, key: str
    ) -> BatchStatus:
        params = {name: v.isoformat() if isinstance(v, datetime) else v for name, v in options.items()}
        if defaults:
            params["defaults"] = msgspec.json.encode(defaults).decode()
        return self._transport.post_lines(BatchStatus, "/v1/batches", lines, params=params, key=key)


def _joined(lines: Iterable[bytes], size: int = 1 << 18) -> Iterator[bytes]:
    """Lines as chunks of about `size` bytes: one write a line would be most of the work."""
    chunk = bytearray()
    for line in lines:
        chunk += line
        chunk += b"\n"
        if len(chunk) >= size:
            yield bytes(chunk)
            chunk.clear()
    if chunk:
        yield bytes(chunk)


def _job_fields(prompt: str | Sequence[int], adapter: str | None, custom_id: str | None) -> dict[str, Any]:
    return _either("prompt", prompt) | _present(adapter=adapter, custom_id=custom_id)


def _either(name: str, value: str | Sequence[int] | None) -> dict[str, Any]:
    """`value` under the name that its kind has, text or token ids; nothing for None."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {name: value}
    return {f"{name}_token_ids": [operator.index(token) for token in value]}


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _key(given: str | None) -> str:
    return given or uuid.uuid4().hex
