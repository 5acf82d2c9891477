"""A batch as its submitter holds it: counts, flags, and its results in the order in which they were committed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from msgspec import UNSET, UnsetType

from medley.client.downloads import download, require_suffix
from medley.client.errors import Timeout
from medley.client.files import to_table
from medley.client.progress import bar
from medley.client.transport import Transport
from medley.client.types import BatchAdapter, BatchAdapters, BatchStatus, Result, ResultPage

if TYPE_CHECKING:
    import pyarrow as pa

WAIT_S = 20.0  # how long one request waits at the service for more results
LOOK_S = 0.5  # and while a bar is to move
PAGE = 1_000  # results a request
END = 2**63 - 1  # after every result that there may be


class Batch:
    """A submitted batch. `status` is what was last heard of it.

    As a context manager it cancels itself where the block raises.
    """

    def __init__(self, transport: Transport, status: BatchStatus) -> None:
        self._transport = transport
        self.status = status

    @property
    def id(self) -> str:
        return self.status.id

    @property
    def job_ids(self) -> tuple[str, ...] | None:
        """The jobs' ids in the order submitted; None for a batch of more than 10,000."""
        return self.status.job_ids

    def refresh(self) -> BatchStatus:
        """Asks how the batch stands."""
        self.status = self._transport.get(BatchStatus, f"/v1/batches/{self.id}")
        return self.status

    def page(
        self,
        *,
        after: int = 0,
        limit: int = PAGE,
        wait: float | None = None,
        include_tokens: bool = False,
        latest: bool = False,
    ) -> ResultPage:
        """Up to `limit` results after `after`; waits up to `wait` seconds for the first of them."""
        include = "tokens" if include_tokens else None
        view = "latest" if latest else None
        params = {"after": after, "limit": limit, "wait": wait, "include": include, "view": view}
        return self._transport.get(ResultPage, f"/v1/batches/{self.id}/results", params)

    def results(
        self,
        *,
        after: int = 0,
        follow: bool = True,
        include_tokens: bool = False,
        latest: bool = False,
        timeout: float | None = None,
    ) -> Iterator[Result]:
        """Each ended job once, as they end. `after` is the `seq` of the last one already seen, to go on from there.

        follow: wait for jobs that have not ended; else stop at what there is. include_tokens: with token_ids and
        logprobs. latest: without results that a retry has superseded by now. Raises Timeout where `timeout` seconds
        pass without the end.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left_s = WAIT_S if deadline is None else max(0.0, deadline - time.monotonic())
            wait = round(min(WAIT_S, left_s), 3) if follow else None
            page = self.page(after=after, wait=wait, include_tokens=include_tokens, latest=latest)
            yield from page.results
            after = page.next
            # A page with large results is shorter than asked for: only an empty one says that there are no more.
            if page.finished or (not follow and not page.results):
                return
            if left_s == 0:
                raise self._timeout(timeout)

    def download(
        self,
        path: str | Path,
        *,
        after: int = 0,
        follow: bool = True,
        include_tokens: bool = False,
        latest: bool = False,
        timeout: float | None = None,
        progress: bool = False,
    ) -> int:
        """Writes the results to a .jsonl or .parquet file, as `results` gives them. Returns how many it holds.

        Called again with the same path, after whatever has cut it off, it goes on behind what is there. progress: with
        a live bar, in a notebook, on a terminal, or as a line now and then. Raises ValueError for another
        kind of file, or one that holds something else.
        """

        file = Path(path)
        require_suffix(file)

        def read(seq: int) -> Iterator[Result]:
            return self.results(after=seq, follow=follow, include_tokens=include_tokens, latest=latest, timeout=timeout)

        counts = self.status.counts
        num_results = counts.total if latest else counts.total + counts.retried
        with bar(self._label, num_results) if progress else nullcontext(_show_nothing) as show:
            return download(self, file, read, show, after=after, include_tokens=include_tokens)

    def to_arrow(self, *, follow: bool = True, include_tokens: bool = False, latest: bool = True) -> pa.Table:
        """The results as an Arrow table, in memory; without those that a retry has superseded, unless latest=False."""
        results = self.results(follow=follow, include_tokens=include_tokens, latest=latest)
        return to_table(results, include_tokens=include_tokens)

    def to_pandas(self, *, follow: bool = True, include_tokens: bool = False, latest: bool = True) -> Any:
        """The table of `to_arrow` as a pandas.DataFrame; needs pandas (`pip install 'medley[pandas]'`)."""
        return self.to_arrow(follow=follow, include_tokens=include_tokens, latest=latest).to_pandas()

    def wait(self, timeout: float | None = None, *, progress: bool = False) -> BatchStatus:
        """Returns once every job has ended. Raises Timeout after `timeout` seconds.

        progress: with a live bar, in a notebook, on a terminal, or as a line now and then.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        counts, look_s = self.status.counts, LOOK_S if progress else WAIT_S
        with bar(self._label, counts.total, done=counts.ended) if progress else nullcontext(_show_nothing) as show:
            while True:
                left_s = look_s if deadline is None else max(0.0, deadline - time.monotonic())
                has_finished = self.has_finished(wait=round(min(look_s, left_s), 3))
                if has_finished or progress:
                    show(self.refresh().counts.ended)
                if has_finished:
                    return self.status
                if left_s == 0:
                    raise self._timeout(timeout)

    def has_finished(self, *, wait: float | None = None) -> bool:
        """Whether every job has ended; waits up to `wait` seconds for that."""
        return self.page(after=END, limit=1, wait=wait).finished

    @property
    def _label(self) -> str:
        """What a bar is called."""
        return (self.status.sweep.name if self.status.sweep else self.status.name) or self.id

    def _timeout(self, timeout: float | None) -> Timeout:
        return Timeout(f"{self.id} has not finished after {timeout:g} s")

    def cancel(self) -> BatchStatus:
        """Ends what waits and stops what runs; finished results are kept."""
        return self._act("cancel")

    def pause(self) -> BatchStatus:
        """Holds what waits, and puts back what runs with the tokens it has."""
        return self._act("pause")

    def resume(self) -> BatchStatus:
        return self._act("resume")

    def update(self, *, priority: str | None = None, deadline_at: datetime | UnsetType | None = UNSET) -> BatchStatus:
        """Changes the priority and the deadline (None takes it away) of what has not ended."""
        body: dict[str, Any] = {} if priority is None else {"priority": priority}
        if deadline_at is not UNSET:
            body["deadline_at"] = deadline_at
        self.status = self._transport.patch(BatchStatus, f"/v1/batches/{self.id}", body)
        return self.status

    def retry(
        self,
        *,
        states: Sequence[str] = ("failed",),
        codes: Sequence[str] | str | None = None,
        idempotency_key: str | None = None,
    ) -> BatchStatus:
        """Makes jobs that ended without a result again, each once an end; `status.counts.retried` counts them.

        states: of failed, cancelled, expired. codes: of failures, or "retryable" for those that may pass by
        themselves; None: all. Raises Conflict where they would only end again.
        """
        body: dict[str, Any] = {"states": list(states)}
        if codes is not None:
            body["codes"] = codes if isinstance(codes, str) else list(codes)
        key = idempotency_key or uuid.uuid4().hex
        self.status = self._transport.post(BatchStatus, f"/v1/batches/{self.id}/retry", body, key=key)
        return self.status

    def adapters(self) -> tuple[BatchAdapter, ...]:
        """How each adapter of the batch stands: counts, usage, failures by code, rate and time left; the base last."""
        answer = self._transport.get(BatchAdapters, f"/v1/batches/{self.id}/adapters")
        self.status = answer.batch
        return answer.adapters

    def _act(self, verb: str) -> BatchStatus:
        self.status = self._transport.post(BatchStatus, f"/v1/batches/{self.id}/{verb}")
        return self.status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.cancel()

    def __repr__(self) -> str:
        counts = self.status.counts
        return f"<{type(self).__name__} {self.id} {self.status.state} {counts.ended}/{counts.total}>"


def _show_nothing(done: int) -> None:
    """Where there is no bar."""
