"""The leader's books: sums that follow changes, whatever order lanes and tenants come in."""

from __future__ import annotations

from plain_plans import HIGH, NORMAL, uid

from medley.db.changes import Horizon, News, Total
from medley.db.demand import Change
from medley.dispatcher.books import Books

LANE, OTHER, TENANT = uid(1), uid(2), uid(9)
NOWHERE = Horizon(0, 0, [])


def change(lane: int, num: int, *, priority: int = NORMAL, first: int | None = None, shared: bool = False) -> Change:
    revision = uid(100) if shared else uid(lane)
    return Change(uid(lane), priority, TENANT, revision, num, None if first is None else uid(first))


def news(*demand: Change, counters: tuple[Total, ...] = ()) -> News:
    return News(NOWHERE, list(demand), list(counters))


def queued(books: Books) -> dict[tuple[int, int], int]:
    return {(waits.lane.int, waits.priority): waits.num_queued for waits in books.waiting()}


def test_what_waits_is_what_came_less_what_left_by_lane_and_priority() -> None:
    books = Books(news(change(1, 5), change(1, 2, priority=HIGH), change(2, 1)))
    assert queued(books) == {(1, NORMAL): 5, (1, HIGH): 2, (2, NORMAL): 1}
    books.follow(news(change(1, -5), change(2, 3)))
    assert queued(books) == {(1, HIGH): 2, (2, NORMAL): 4}
    books.follow(news(change(1, 1)))
    assert queued(books) == {(1, NORMAL): 1, (1, HIGH): 2, (2, NORMAL): 4}


def test_a_lane_counted_below_nothing_waits_for_the_look_that_puts_it_right() -> None:
    books = Books(news(change(1, -2)))
    assert queued(books) == {}
    books.follow(news(change(1, 3)))
    assert queued(books) == {(1, NORMAL): 1}


def test_only_lanes_to_which_jobs_came_are_told_with_an_id_that_none_is_below() -> None:
    books = Books(news())
    came = books.follow(news(change(1, 2, first=7), change(2, -1)))
    assert came == [((LANE, NORMAL), uid(7))]


def test_what_waits_for_adapters_of_others_is_told_from_ones_own() -> None:
    books = Books(news(change(1, 1), change(2, 1, shared=True)))
    assert books.shared() == [(TENANT, uid(100))]


def test_accounts_are_of_who_was_asked_about_and_of_all_who_were_backlogged() -> None:
    books = Books(news(counters=(Total(uid(1), 5.0), Total(uid(2), 7.0, is_backlogged=True), Total(uid(3), 9.0))))
    books.follow(news(counters=(Total(uid(1), -1.5), Total(uid(4), 2.0))))
    accounts = {account.id.int: account for account in books.accounts([uid(1), uid(5)], {uid(1): 2.0})}
    assert {number: account.service for number, account in accounts.items()} == {1: 3.5, 2: 7.0, 5: 0.0}
    assert (accounts[1].weight, accounts[5].weight) == (2.0, 1.0)
    assert (accounts[1].is_backlogged, accounts[2].is_backlogged) == (False, True)
    books.see_standings(backlogged=[uid(1)], satisfied=[uid(2)])
    assert books.backlogged == {uid(1)}
    assert books.top_service() == 9.0
