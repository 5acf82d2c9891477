"""`medley fleet` and `medley top` on a running service: what is said by hand happens, and holds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Medley

from medley.client import Client
from medley.demo.skills import SKILLS
from medley.local.stack import LocalStack

ASSETS = Path(__file__).parents[2] / "app/medley/demo/assets"
WAIT_S = 120.0
NUM_JOBS = 400  # which run for longer than a test may be held up
NUM_DRAINED = 200  # where all must end


class Fleet:
    """A stack of two workers with one tenant that has one adapter."""

    def __init__(self, stack: LocalStack) -> None:
        self.client = Client(stack.url, stack.add_tenant("acme"))
        self.client.adapters.add(SKILLS[0].name, ASSETS / "adapters" / SKILLS[0].name)
        self._stack = stack
        self.medley = Medley(None, None)

    def load(self, num_jobs: int = NUM_JOBS) -> Any:
        jobs = [{"prompt": f"w{n}=", "adapter": SKILLS[0].name if n % 2 else None} for n in range(num_jobs)]
        return self.client.submit_many(jobs, max_tokens=100, ignore_eos=True)

    def run(self, *args: str) -> list[Any]:
        return self.medley.json(*args, "--data-dir", str(self._stack.data_dir))

    def states(self) -> dict[str, str]:
        return {row["id"]: row["state"] for row in self.run("fleet")}

    def wait_for(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not holds():
            assert time.monotonic() < deadline, (
                f"{what}: {self.run('fleet')}\n{self._stack.log_path.read_text()[-4000:]}"
            )
            time.sleep(0.1)

    def log_lines(self, word: str) -> int:
        return self._stack.log_path.read_text().count(word)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    environ = {"MEDLEY_LEASE_S": "10", "MEDLEY_TICK_S": "0.5", "MEDLEY_MAX_NUM_SEQS": "4"}
    # A hook that never answers, and a secret that the dispatcher alone is given: neither is in anybody's way.
    environ |= {"MEDLEY_SCALE_HOOK": "http://127.0.0.1:9/", "MEDLEY_SCALE_HOOK_SECRET": "whsec_" + "QUJD" * 10}
    with LocalStack(tmp_path_factory.mktemp("data"), workers=2, environ=environ) as stack:
        fleet = Fleet(stack)
        fleet.wait_for("two workers", lambda: len(fleet.states()) == 2)
        yield fleet
        fleet.client.close()


def test_a_worker_put_to_sleep_by_hand_sleeps_through_any_load_until_it_is_released(fleet: Fleet) -> None:
    one, other = fleet.states()
    fleet.run("fleet", "sleep", one)
    batch = fleet.load()
    fleet.wait_for("progress", lambda: batch.refresh().counts.succeeded >= 100)
    assert fleet.states() == {one: "asleep", other: "active"}
    fleet.run("fleet", "release", one)
    fleet.wait_for("both at work", lambda: set(fleet.states().values()) == {"active"})
    batch.cancel()
    batch.wait(timeout=WAIT_S)
    counts = batch.refresh().counts
    assert counts.succeeded + counts.cancelled == NUM_JOBS


def test_a_drained_worker_gives_its_jobs_to_the_other_which_goes_on_with_them(fleet: Fleet) -> None:
    fleet.run("fleet", "wake", "--all")
    fleet.wait_for("both awake", lambda: set(fleet.states().values()) == {"active"})
    batch = fleet.load(NUM_DRAINED)
    fleet.wait_for("both at work", lambda: all(row["num_leased"] for row in fleet.run("fleet")))
    one, other = fleet.states()
    fleet.run("fleet", "drain", one)
    fleet.wait_for("one asleep", lambda: fleet.states() == {one: "asleep", other: "active"})
    assert fleet.run("fleet", "list")[0]["num_leased"] == 0
    batch.wait(timeout=WAIT_S)
    assert batch.refresh().counts.succeeded == NUM_DRAINED
    fleet.run("fleet", "release", "--all")


def test_top_shows_the_batch_by_tenant_and_adapter_as_it_changes(fleet: Fleet) -> None:
    fleet.run("fleet", "wake", "--all")
    batch = fleet.load()
    shown: list[Any] = []

    def sees_all() -> bool:
        shown.extend(share for row in fleet.run("top") for share in row["batch"] if share["decoding"])
        return {share["adapter"] for share in shown} >= {None, SKILLS[0].name}

    fleet.wait_for("both lanes in rows", sees_all)
    assert {share["tenant"] for share in shown} == {"acme"}
    assert all(share["decoding"] + share["prefilling"] <= 4 for share in shown)
    batch.cancel()
    batch.wait(timeout=WAIT_S)
    idle = {"decoding": 0, "prefilling": 0, "waiting": 0, "shares": 0}
    fleet.wait_for(
        "nobody in rows", lambda: all(row["batch"] == [] and row["others"] == idle for row in fleet.run("top"))
    )
    fleet.run("fleet", "release", "--all")


def test_a_terminal_gets_a_live_table(fleet: Fleet) -> None:
    data_dir = str(fleet._stack.data_dir)
    status, shown = fleet.medley.in_terminal("fleet", "--data-dir", data_dir)
    assert status == 0
    assert "pool default: 2 workers" in shown
    assert json.dumps(next(iter(fleet.states())))[8:16] in shown


def test_a_watch_in_a_pipe_goes_on_until_it_is_interrupted(fleet: Fleet) -> None:
    command = [sys.executable, "-m", "medley", "fleet", "-w", "--every", "0.2", "--json"]
    command += ["--data-dir", str(fleet._stack.data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        seen = [json.loads(process.stdout.readline())["id"] for _ in range(6)]
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=WAIT_S)
    assert (process.returncode, said) == (0, "")
    assert set(seen) == set(fleet.states())
