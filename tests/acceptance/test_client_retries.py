"""The client on a bad line: what does not get through is sent again, and never makes a second thing."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from api_server import ADAPTERS, Api
from bad_line import BadLine, Fate, bad_line

import medley
from medley.client import Client


@pytest.fixture
def line(api: Api) -> Iterator[BadLine]:
    with bad_line(api.url) as line:
        yield line


@pytest.fixture
def through(api: Api, tenant: str, line: BadLine) -> Iterator[Client]:
    """A client of the tenant behind the bad line."""
    with Client(line.url, api.key(tenant), retries=3) as client:
        yield client


FATES = ([Fate.DROPPED, Fate.DROPPED], [Fate.AWAY, Fate.AWAY], [Fate.UNHEARD, Fate.UNHEARD])


@pytest.mark.parametrize("fates", FATES, ids=lambda fates: fates[0].name)
def test_a_create_that_fails_twice_is_made_once(through: Client, line: BadLine, fates: list[Fate]) -> None:
    line.fates = list(fates)
    job = through.submit("hello")
    assert len(line.requests) == 3
    assert [b.id for b in through.batches()] == [job.status.batch_id]


def test_a_stream_of_lines_is_sent_whole_again(through: Client, line: BadLine) -> None:
    line.fates = [Fate.DROPPED, Fate.UNHEARD]
    batch = through.submit_many(["hello"] * 2_000)
    assert batch.status.counts.total == 2_000
    assert [b.id for b in through.batches()] == [batch.id]


def test_an_upload_and_a_sweep_survive_lost_answers(through: Client, line: BadLine) -> None:
    line.fates = [Fate.UNHEARD, Fate.DROPPED]
    adapter = through.adapters.add("add", ADAPTERS / "add")
    assert (adapter.num_revisions, adapter.state) == (1, "ready")
    line.fates = [Fate.UNHEARD]
    sweep = through.sweep("name", ["a"], adapters="add")
    assert not sweep.is_resumed
    line.fates = [Fate.UNHEARD]
    assert sweep.cancel().id == sweep.id


def test_a_busy_service_is_asked_again_when_it_says(through: Client, line: BadLine) -> None:
    line.fates = [Fate.BUSY]
    started = time.monotonic()
    through.tenant()
    assert time.monotonic() - started >= 1


def test_a_refusal_is_not_sent_again(through: Client, line: BadLine) -> None:
    with pytest.raises(medley.InvalidRequest):
        through.submit("")
    with pytest.raises(medley.NotFound):
        through.job("job_nobody")
    assert len(line.requests) == 2


def test_a_line_that_stays_bad_is_a_connection_error_and_a_service_that_stays_away_says_so(
    through: Client, line: BadLine
) -> None:
    line.fates = [Fate.DROPPED] * 4
    with pytest.raises(medley.Connection, match="no answer from http"):
        through.tenant()
    assert len(line.requests) == 4
    line.fates = [Fate.AWAY] * 4
    with pytest.raises(medley.APIError) as raised:
        through.tenant()
    assert raised.value.status == 503


def test_nothing_to_connect_to_is_said_at_once_where_no_retry_can_help() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        with Client(url, "mk_x", retries=1) as client, pytest.raises(medley.Connection, match="refused"):
            client.tenant()
    with Client("ftp://host", "mk_x") as client, pytest.raises(medley.Connection, match="protocol"):
        client.tenant()
    for url, key in (("http://a:b:c", "mk_x"), ("http://host", "mk_\n"), ("http://host", "mk_é")):
        with pytest.raises(ValueError, match="got"):
            Client(url, key)


def test_an_answer_of_something_else_is_no_answer(client: Client) -> None:
    with pytest.raises(medley.APIError, match="not an answer of the service"):
        client._transport.get(medley.client.JobStatus, "/livez")
