"""One job as its submitter holds it."""

from __future__ import annotations

import time

from medley.client.errors import JobEnded, Timeout
from medley.client.transport import Transport
from medley.client.types import Completion, JobStatus

WAIT_S = 30.0  # how long one request waits at the service


class Job:
    """A submitted job. `status` is what was last heard of it."""

    def __init__(self, transport: Transport, status: JobStatus) -> None:
        self._transport = transport
        self.status = status

    @property
    def id(self) -> str:
        return self.status.id

    def refresh(self) -> JobStatus:
        """Asks how the job stands."""
        self.status = self._transport.get(JobStatus, f"/v1/jobs/{self.id}")
        return self.status

    def wait(self, timeout: float | None = None) -> JobStatus:
        """Returns once the job has ended, however it ended. Raises Timeout after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.status.has_ended:
            left_s = WAIT_S if deadline is None else max(0.0, deadline - time.monotonic())
            wait_s = round(min(WAIT_S, left_s), 3)
            self.status = self._transport.get(JobStatus, f"/v1/jobs/{self.id}", {"wait": wait_s})
            if left_s == 0 and not self.status.has_ended:
                raise Timeout(f"job {self.id} is still {self.status.state} after {timeout:g} s")
        return self.status

    def result(self, timeout: float | None = None) -> Completion:
        """The job's completion. Raises JobEnded where it failed, was cancelled or expired, and Timeout."""
        status = self.wait(timeout)
        if status.result is None:
            raise JobEnded(status)
        return status.result

    def cancel(self) -> JobStatus:
        """Asks for the job's end; a job that has ended stays as it is."""
        self.status = self._transport.post(JobStatus, f"/v1/jobs/{self.id}/cancel")
        return self.status

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.status.state}>"
