"""Fairness over many plans: the stated bounds on random traces, no starvation, few loads."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from plain_plans import active, base_lane, homes, lane, replace_lane, uid

from medley.dispatcher.plans import Rules, Tenant
from medley.dispatcher.policy import plan


class Backlog:
    """Tenants that wait throughout, each with two adapters, and jobs that end at random with less than was charged."""

    def __init__(self, seed: int, *, is_corrected: bool) -> None:
        self.draw = random.Random(seed)
        self.rules = Rules(max_turn=self.draw.choice([1, 4, 16]), max_turns=self.draw.choice([1, 5, 1_000]))
        self.weights = {t: self.draw.choice([0.5, 1, 4]) for t in (1, 2, 3, 4)}
        self.sizes = {t: self.draw.choice([5, 40, 300]) for t in self.weights}
        self.load = self.draw.choice([0.0, 100.0])
        self.charged = dict.fromkeys(self.weights, 0.0)
        self.received = dict.fromkeys(self.weights, 0.0)
        self.flying: dict[int, list[float]] = {t: [] for t in self.weights}
        self.most_flying = dict.fromkeys(self.weights, 0.0)
        self.ends = 0.7 if is_corrected else 0.0

    def turn(self, tenant: int) -> float:
        """The most that one turn adds to the counter: U of the theorem."""
        num_jobs = max(self.rules.max_turn, self.rules.jobs_a_load)
        return (num_jobs * self.sizes[tenant] + self.load) / self.weights[tenant]

    def plan(self) -> None:
        lanes = [
            replace_lane(lane(t * 10 + i, t, 1_000, est=self.sizes[t]), load_tokens=self.load)
            for t in self.weights
            for i in range(2)
        ]
        tenants = [Tenant(uid(t), self.charged[t], self.weights[t]) for t in self.weights]
        workers = [active(90 + i, rows=self.draw.randrange(1, 40)) for i in range(2)]
        for made in plan(lanes, tenants, workers, rules=self.rules).assignments:
            tenant = made.lane.int // 10
            jobs = [self.sizes[tenant] / self.weights[tenant]] * made.num_jobs
            self.charged[tenant] += sum(jobs) + made.load_tokens / self.weights[tenant]
            self.received[tenant] += made.load_tokens / self.weights[tenant]
            self.flying[tenant] += jobs

    def end(self) -> None:
        for tenant, flying in self.flying.items():
            self.most_flying[tenant] = max(self.most_flying[tenant], sum(flying))
            ended = [job for job in flying if self.draw.random() < self.ends]
            self.flying[tenant] = flying[len(ended) :]
            used = [job * self.draw.random() for job in ended]
            self.received[tenant] += sum(used)
            self.charged[tenant] += sum(used) - sum(ended)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_counters_of_tenants_that_wait_throughout_differ_by_one_turn_at_the_most(seed: int) -> None:
    backlog = Backlog(seed, is_corrected=False)
    for _ in range(30):
        backlog.plan()
        charged = backlog.charged
        assert max(charged.values()) - min(charged.values()) <= max(map(backlog.turn, charged)) + 1e-6


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_service_gap_of_tenants_that_wait_throughout_is_bounded(seed: int) -> None:
    backlog = Backlog(seed, is_corrected=True)
    for _ in range(30):
        backlog.plan()
        backlog.end()
        for i, j in itertools.permutations(backlog.charged, 2):
            bound = backlog.turn(i) + backlog.most_flying[j]
            assert backlog.charged[i] - backlog.charged[j] <= bound + 1e-6
            other = backlog.turn(j) + backlog.most_flying[i]
            assert backlog.received[i] - backlog.received[j] <= 2 * max(bound, other) + 1e-6


def test_none_of_a_thousand_tenants_starves() -> None:
    draw = random.Random(1)
    counters = {t: draw.uniform(0, 100) for t in range(1, 1001)}
    sizes = {t: draw.choice([10, 100]) for t in counters}
    lanes = [lane(10_000 + t, t, 50, est=sizes[t]) for t in counters]
    unserved = set(counters)
    for _ in range(80):
        tenants = [Tenant(uid(t), service) for t, service in counters.items()]
        for assignment in plan(lanes, tenants, [active(9, rows=64)]).assignments:
            tenant = assignment.lane.int - 10_000
            counters[tenant] += assignment.num_jobs * sizes[tenant]
            unserved.discard(tenant)
    assert not unserved


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), max_turns=st.sampled_from([64, 128, 1_000]))
def test_a_thousand_tenants_of_equal_jobs_take_turns_round_after_round(seed: int, max_turns: int) -> None:
    draw = random.Random(seed)
    counters = {t: draw.uniform(0, 1) for t in range(1, 1001)}
    lanes = [base_lane(t, 1_000) for t in counters]
    rules = Rules(max_turns=max_turns)
    room = 512  # of a worker with 256 rows, whose jobs have all ended when the next plan is made
    turn = max(1, room // max_turns)
    # Everybody else has one turn between two of one's own, or two where counters began up to a job apart.
    most_plans = 2 * -(-1_000 * turn // room)
    last_served = dict.fromkeys(counters, 0)
    for number in range(1, 2 * most_plans):
        tenants = [Tenant(uid(t), service) for t, service in counters.items()]
        for made in plan(lanes, tenants, [active(9, rows=256)], rules=rules).assignments:
            counters[made.lane.int] += made.num_jobs
            last_served[made.lane.int] = number
        assert min(last_served.values()) >= number - most_plans


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_an_adapter_of_a_sweep_is_loaded_no_more_often_than_its_jobs_are_worth(seed: int) -> None:
    draw = random.Random(seed)
    left = {10 + i: draw.randrange(1, 60) for i in range(40)}
    num_jobs, loads = dict(left), Counter[int]()
    leased, at_home = dict.fromkeys((1, 2, 3), 0), homes()
    rules = Rules(patience_s=1e9)
    while any(left.values()):
        lanes = [replace_lane(lane(n, 1, k), load_tokens=1.0) for n, k in left.items() if k]
        workers = [active(w, rows=8, leased=k, rate=4) for w, k in leased.items()]
        for made in plan(lanes, [Tenant(uid(1), 0)], workers, at_home, rules=rules).assignments:
            left[made.lane.int] -= made.num_jobs
            leased[made.worker.int] += made.num_jobs
            loads[made.lane.int] += made.load_tokens > 0
            at_home.setdefault(made.lane, set()).add(made.worker)
        for worker in leased:
            leased[worker] -= draw.randint(0, leased[worker])
    assert all(loads[n] <= 1 + -(-k // rules.jobs_a_load) for n, k in num_jobs.items())
