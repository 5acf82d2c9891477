"""The client: submit, follow, sweep. One sync class over one connection pool."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Self

import msgspec

from medley.client.adapters import Adapters
from medley.client.batches import Batch
from medley.client.jobs import Job
from medley.client.sweeps import Sweep
from medley.client.transport import Transport
from medley.client.types import BatchStatus, JobStatus, Result, WorkerStatus

JobFields = Mapping[str, Any]  # prompt or prompt_token_ids, adapter, custom_id, and sampling fields
LINES_FROM = 2_000  # jobs from which a batch travels as a JSONL stream instead of one JSON body


class _Workers(msgspec.Struct):
    workers: list[WorkerStatus]


class _Tenant(msgspec.Struct):
    name: str


class _Batches(msgspec.Struct):
    batches: list[BatchStatus]
    next: str | None = None


class Client:
    """A tenant's connection to the service at `base_url`. Close it, or use it as a context manager.

    timeout: seconds one request may take. retries: of requests that did not get through (all creates carry an
    idempotency key, so a retry never makes a second job).
    """

    def __init__(self, base_url: str, api_key: str, *, timeout: float = 90.0, retries: int = 6) -> None:
        self._transport = Transport(base_url, api_key, timeout_s=timeout, retries=retries)
        self.adapters = Adapters(self._transport)

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: str | None = None,
        custom_id: str | None = None,
        priority: str | None = None,
        deadline_at: datetime | None = None,
        idempotency_key: str | None = None,
        **sampling: Any,
    ) -> Job:
        """Submits one job: a prompt as text or token ids, an adapter's name (None: the base model), sampling fields.

        On return the job is durable. Raises InvalidRequest with every fault.
        """
        body = _job_fields(prompt, adapter, custom_id) | sampling
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

        Each is a prompt, or a mapping of prompt (or prompt_token_ids), adapter, custom_id and sampling fields;
        `adapter` and `sampling` given here are the defaults.
        """
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
        path: str,
        *,
        name: str | None = None,
        adapter: str | None = None,
        priority: str | None = None,
        idempotency_key: str | None = None,
        **sampling: Any,
    ) -> Batch:
        """Submits a JSONL file, a job a line, streamed from disk as it is."""

        def lines() -> Iterator[bytes]:
            with open(path, "rb") as file:  # noqa: PTH123 - a plain name, and the hot path of a large upload
                while chunk := file.read(1 << 20):
                    yield chunk

        defaults = _present(adapter=adapter) | sampling
        options = _present(name=name, priority=priority)
        status = self._post_lines(lines, options, defaults, _key(idempotency_key))
        return Batch(self._transport, status)

    def sweep(
        self,
        name: str,
        prompts: Sequence[str | JobFields],
        *,
        adapters: Sequence[str],
        expected: Sequence[str] | None = None,
        include_base: bool = False,
        seeds: Sequence[int] | None = None,
        priority: str | None = None,
        deadline_at: datetime | None = None,
        **sampling: Any,
    ) -> Sweep:
        """Declares prompts x adapters as one durable job; the service expands it. The same call again resumes it.

        prompts: texts, or mappings of prompt (or prompt_token_ids), expected, custom_id, and adapter for a prompt
        that concerns one adapter (and the base) alone. adapters: names and patterns such as "acme/*". expected:
        what each prompt's answer must equal, in the order of `prompts`. include_base: the base model as a column.
        Raises Conflict where the name belongs to a different sweep.
        """
        rows = [{"prompt": p} if isinstance(p, str) else dict(p) for p in prompts]
        if expected is not None:
            if len(expected) != len(rows):
                raise ValueError(f"expected: got {len(expected)} answers, wanted one for each of {len(rows)} prompts")
            for row, answer in zip(rows, expected, strict=True):
                row["expected"] = answer
        body: dict[str, Any] = {
            "name": name,
            "prompts": rows,
            "adapters": list(adapters),
            "include_base": include_base,
        }
        body |= _present(seeds=seeds, priority=priority, deadline_at=deadline_at) | sampling
        headers = {"Content-Type": "application/json", "Idempotency-Key": _key(None)}
        response = self._transport.request("POST", "/v1/sweeps", content=msgspec.json.encode(body), headers=headers)
        status = msgspec.json.decode(response.content, type=BatchStatus)
        return Sweep(self._transport, status, is_resumed=response.status_code == 200)

    def job(self, job_id: str) -> Job:
        return Job(self._transport, self._transport.get(JobStatus, f"/v1/jobs/{job_id}"))

    def batch(self, batch_id: str) -> Batch:
        return Batch(self._transport, self._transport.get(BatchStatus, f"/v1/batches/{batch_id}"))

    def get_sweep(self, name_or_id: str) -> Sweep:
        return Sweep(self._transport, self._transport.get(BatchStatus, f"/v1/sweeps/{name_or_id}"), is_resumed=True)

    def batches(self, *, limit: int = 50) -> list[BatchStatus]:
        """The newest batches and sweeps."""
        return self._transport.get(_Batches, "/v1/batches", {"limit": limit}).batches

    def results(self, batch: Batch | str, *, after: int = 0, follow: bool = True) -> Iterator[Result]:
        """The results of a batch or sweep as they finish (see `Batch.results`)."""
        handle = batch if isinstance(batch, Batch) else self.batch(batch)
        return handle.results(after=after, follow=follow)

    def cancel(self, target: Job | Batch | str) -> JobStatus | BatchStatus:
        """Cancels a job, a batch or a sweep, given as itself or by id."""
        if isinstance(target, str):
            target = self.job(target) if target.startswith("job_") else self.batch(target)
        return target.cancel()

    def workers(self) -> list[WorkerStatus]:
        """The pool's workers and what their engines have done."""
        return self._transport.get(_Workers, "/v1/workers").workers

    def tenant(self) -> str:
        """The name of the key's tenant."""
        return self._transport.get(_Tenant, "/v1/tenant").name

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
    body: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_token_ids": list(prompt)}
    return body | _present(adapter=adapter, custom_id=custom_id)


def _present(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _key(given: str | None) -> str:
    return given or uuid.uuid4().hex
