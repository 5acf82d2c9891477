from __future__ import annotations

import threading
from uuid import uuid4

from medley_worker.shell.inbox import Inbox


def test_an_id_that_waits_is_not_added_twice_and_order_is_kept() -> None:
    inbox, ids = Inbox(), [uuid4() for _ in range(5)]
    inbox.put(ids[:3])
    inbox.put([ids[1], *ids[3:]])
    assert inbox.take(10, 0) == ids


def test_take_gives_up_to_its_limit_and_keeps_the_rest() -> None:
    inbox, ids = Inbox(), [uuid4() for _ in range(5)]
    inbox.put(ids)
    assert inbox.take(2, 0) == ids[:2]
    assert inbox.take(10, 0) == ids[2:]
    assert inbox.take(10, 0) == []


def test_take_waits_for_the_first_id() -> None:
    inbox, job = Inbox(), uuid4()
    threading.Timer(0.05, inbox.put, [[job]]).start()
    assert inbox.take(10, 60.0) == [job]
