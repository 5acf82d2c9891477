"""When calls about the pool's size are due, on a clock of the test's own; and what their configuration must be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from medley.config import Settings
from medley.dispatcher.glance import Glance
from medley.dispatcher.planner import Waits
from medley.dispatcher.scale_calls import MIN_GAP_S, RELEASABLE, WANTED, ScaleCalls
from medley.environment import ConfigError

REPEAT_S = 60.0


def worker(number: int, state: str = "asleep", *, slept_s: float = 0.0, held: str | None = None) -> Any:
    return SimpleNamespace(
        id=UUID(int=number),
        host="here",
        pid=number,
        state=state,
        desired_state=state,
        held_state=held,
        unchanged_s=slept_s,
        num_leased=0,
        max_num_seqs=8,
        stats={},
    )


def glance(*rows: Any, wanted: int = 0) -> Glance:
    waits = [Waits(UUID(int=1), UUID(int=1), None, 1, 30)]
    return Glance(0.0, "default", 7, waits, rows, wanted, lambda _: 2.0, lambda _lane, _now: 3.0, 9.0)


def calls() -> ScaleCalls:
    return ScaleCalls(release_after_s=600, repeat_s=REPEAT_S)


def test_nothing_is_due_while_there_are_enough_and_none_has_slept_long() -> None:
    desk = calls()
    desk.see(glance(worker(1), worker(2, slept_s=599), wanted=2), 0)
    assert desk.due(0) is None


def test_workers_that_are_missing_are_called_for_at_once_and_again_while_they_are() -> None:
    desk, short = calls(), glance(worker(1), worker(2, held="asleep"), wanted=3)
    desk.see(short, 0)
    call = desk.due(0)
    assert call is not None
    assert call.type == WANTED
    assert (call.body["wanted"], call.body["registered"], call.body["missing"]) == (3, 1, 2)
    assert (call.body["queued_jobs"], call.body["workers_by_state"], call.body["term"]) == (30, {"asleep": 2}, 7)
    assert call.body["id"] == call.id
    assert desk.made(call, 1, is_heard=True) == REPEAT_S
    desk.see(short, 1)
    assert desk.due(1 + REPEAT_S - 0.1) is None
    again = desk.due(1 + REPEAT_S)
    assert again == call, "a repeat has the id of the first"
    desk.see(glance(worker(1), worker(2), worker(3), wanted=3), 2 + REPEAT_S)
    assert desk.due(1e9) is None


def test_a_call_that_failed_comes_again_ever_later_under_its_id() -> None:
    desk, short = calls(), glance(wanted=1)
    desk.see(short, 0)
    now, waits, ids = 0.0, [], set()
    for _ in range(9):
        call = desk.due(now)
        assert call is not None
        ids.add(call.id)
        wait_s = desk.made(call, now, is_heard=False)
        waits.append(wait_s)
        desk.see(short, now)
        assert desk.due(now + wait_s - 0.01) is None
        now += wait_s
    assert len(ids) == 1
    assert 0.8 <= waits[0] <= 1.2
    assert 3.2 <= waits[2] <= 4.8
    assert 48 <= waits[-1] <= 72


def test_more_is_news_after_a_short_while_and_less_waits_for_the_next_call() -> None:
    desk = calls()
    desk.see(glance(wanted=2), 0)
    first = desk.due(0)
    assert first is not None
    desk.made(first, 0, is_heard=True)
    desk.see(glance(wanted=1), 1)
    assert desk.due(REPEAT_S - 1) is None
    desk.see(glance(wanted=5), 2)
    assert desk.due(2) is None
    grown = desk.due(MIN_GAP_S)
    assert grown is not None
    assert grown.id != first.id
    assert grown.body["wanted"] == 5
    desk.made(grown, MIN_GAP_S, is_heard=True)
    for now, wanted in ((6, 3), (7, 4), (8, 5)):  # up and down below what was heard
        desk.see(glance(wanted=wanted), now)
        assert desk.due(MIN_GAP_S + REPEAT_S - 1) is None


def test_a_receiver_that_fails_is_not_called_faster_because_the_queue_grows() -> None:
    desk = calls()
    desk.see(glance(wanted=1), 0)
    for number in range(6):
        call = desk.due(1e6 * number)
        assert call is not None
        desk.made(call, 1e6 * number, is_heard=False)
    desk.see(glance(wanted=9), 5e6 + 1)
    assert desk.due(5e6 + 20) is None


def test_workers_that_slept_long_are_named_unless_somebody_holds_them() -> None:
    desk = calls()
    rows = [worker(1, slept_s=601), worker(2, slept_s=5), worker(3, slept_s=700, held="asleep"), worker(4, "active")]
    desk.see(glance(*rows, wanted=1), 0)
    call = desk.due(0)
    assert call is not None
    assert call.type == RELEASABLE
    named = call.body["workers"]
    assert named == [{"id": "worker_" + UUID(int=1).hex, "host": "here", "pid": 1, "asleep_s": 601}]
    desk.made(call, 0, is_heard=True)
    rows[1] = worker(2, slept_s=650)
    desk.see(glance(*rows, wanted=1), 10)
    more = desk.due(10)
    assert more is not None
    assert isinstance(more.body["workers"], list)
    assert len(more.body["workers"]) == 2


def test_what_another_leader_is_to_say_is_forgotten() -> None:
    desk = calls()
    desk.see(glance(wanted=1), 0)
    desk.forget()
    assert desk.due(0) is None


LOCAL = {
    "MEDLEY_DATABASE_URL": "postgresql+psycopg://medley_work@/medley?host=/tmp/s",
    "MEDLEY_REDIS_URL": "unix:///tmp/s/redis.sock",
    "MEDLEY_STORE_URL": "file:///store",
}
SECRET = "whsec_" + "QUJD" * 10


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        ({"MEDLEY_SCALE_HOOK": "http://scaler.example/x", "MEDLEY_SCALE_HOOK_SECRET": SECRET}, "MEDLEY_SCALE_HOOK"),
        ({"MEDLEY_SCALE_HOOK": "https://me@scaler.example/", "MEDLEY_SCALE_HOOK_SECRET": SECRET}, "MEDLEY_SCALE_HOOK"),
        ({"MEDLEY_SCALE_HOOK": "https://scaler.example/x"}, "MEDLEY_SCALE_HOOK_SECRET"),
        ({"MEDLEY_SCALE_HOOK": "https://x.example/", "MEDLEY_SCALE_HOOK_SECRET": "short"}, "MEDLEY_SCALE_HOOK_SECRET"),
        ({"MEDLEY_SCALE_WAIT_S": "0"}, "MEDLEY_SCALE_WAIT_S"),
        ({"MEDLEY_METRICS_PORT": "http"}, "MEDLEY_METRICS_PORT"),
    ],
)
def test_a_bad_configuration_names_its_key_and_no_secret(environ: dict[str, str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_env(LOCAL | environ)
    assert caught.value.key == key
    assert "QUJD" not in str(caught.value)
    assert "short" not in str(caught.value)


def test_a_trusted_network_and_this_machine_need_no_encryption() -> None:
    for environ in (
        {"MEDLEY_SCALE_HOOK": "http://127.0.0.1:1/x"},
        {"MEDLEY_SCALE_HOOK": "http://scaler:1/x", "MEDLEY_PLAINTEXT_HOSTS": "scaler"},
        {"MEDLEY_SCALE_HOOK": "https://scaler.example/x"},
    ):
        found = Settings.from_env(LOCAL | environ | {"MEDLEY_SCALE_HOOK_SECRET": SECRET})
        assert found.scale.hook == environ["MEDLEY_SCALE_HOOK"]
