"""`medley up` as a user has it: ready, a second one refused, processes replaced, stopped, killed, gone on with."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest
from cuda_driver import make_driver
from waiting import alive, wait_until

from medley.local.stack import LocalStack, StackFailed


def _medley(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "medley", *args], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with LocalStack(tmp_path_factory.mktemp("up") / "data", workers=2) as running:
        yield running


def test_it_is_ready_when_it_says_so(stack: LocalStack) -> None:
    assert httpx.get(f"{stack.url}/readyz").status_code == 200
    assert set(stack.pids()) == {"postgres", "redis", "api", "dispatcher", "tasks", "worker.0", "worker.1"}
    wait_until(lambda: f"| ready: {stack.url} " in stack.log_path.read_text())


def test_a_second_one_on_the_same_folder_says_who_holds_it(stack: LocalStack) -> None:
    refused = _medley("up", "--data-dir", str(stack.data_dir), "--port", "0")
    assert refused.returncode == 1
    assert f"in use by process {stack.supervisor_pid} since 20" in refused.stderr
    assert httpx.get(f"{stack.url}/readyz").status_code == 200


def test_tenants_add_prints_a_key_that_opens_the_api(stack: LocalStack) -> None:
    made = _medley("tenants", "add", "acme", "--data-dir", str(stack.data_dir))
    assert made.returncode == 0, made.stderr
    for key, status in ((made.stdout.strip(), 200), (stack.add_tenant("globex"), 200), ("mk_wrong", 401)):
        answer = httpx.get(f"{stack.url}/v1/tenant", headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == status
    assert _medley("tenants", "add", "No Such Name!", "--data-dir", str(stack.data_dir)).returncode == 2


@pytest.mark.parametrize("name", ["api", "dispatcher", "tasks", "worker.0", "redis", "postgres"])
def test_a_killed_process_is_replaced_and_the_api_gets_ready_again(stack: LocalStack, name: str) -> None:
    before = stack.kill(name)
    wait_until(lambda: stack.pids().get(name, before) != before, f"another {name}")

    def is_ready() -> bool:
        try:
            return httpx.get(f"{stack.url}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False  # cut in the middle by the kill

    wait_until(is_ready, "readiness")


def test_only_the_api_listens_and_only_on_this_machine(stack: LocalStack) -> None:
    for name, pid in stack.pids().items():
        listening = [c for c in psutil.Process(pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {c.laddr.ip for c in listening} == ({"127.0.0.1"} if name == "api" else set())


def test_killed_it_leaves_no_process_then_goes_on_with_its_data_until_ctrl_c(tmp_path: Path) -> None:
    first = LocalStack(tmp_path / "data")
    first.start()
    key = first.add_tenant("acme")
    family = psutil.Process(first.supervisor_pid).children(recursive=True)
    assert len(family) >= 6
    first.kill_supervisor()
    wait_until(lambda: not alive(family), "the end of every process")

    second = LocalStack(tmp_path / "data")
    second.start()
    answer = httpx.get(f"{second.url}/v1/tenant", headers={"Authorization": f"Bearer {key}"})
    assert answer.json()["name"] == "acme"
    with psycopg.connect(second.database_url().replace("+psycopg", "")) as connection:
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
    _stop_with_ctrl_c(second)


def _stop_with_ctrl_c(stack: LocalStack) -> None:
    """Workers end first and Redis after those that use it; nothing is left, nothing had to be killed."""
    pids = stack.pids()
    up = psutil.Process(stack.supervisor_pid)
    family = up.children(recursive=True)
    up.send_signal(signal.SIGINT)
    early: set[str] = set()

    def is_down() -> bool:
        # The later one is looked at first: gone while the earlier one lives means that the order was broken,
        # however long this process did not look.
        for later, earlier in (("tasks", "worker.0"), ("dispatcher", "worker.0"), ("redis", "api")):
            if not psutil.pid_exists(pids[later]) and psutil.pid_exists(pids[earlier]):
                early.add(f"{later} before {earlier}")
        return not alive([up])

    wait_until(is_down, "the end of medley up", 60)
    assert stack.stop() == 0
    assert alive(family) == []
    assert early == set()
    assert "has not stopped" not in stack.log_path.read_text()


def test_each_worker_has_gpus_of_its_own_and_keeps_them_when_it_is_replaced(tmp_path: Path) -> None:
    environ = make_driver(tmp_path, num_gpus=5) | {"MEDLEY_DEVICE": "cuda:1", "MEDLEY_TENSOR_PARALLEL": "2"}

    def gpus(pid: int) -> dict[str, str | None]:
        found = psutil.Process(pid).environ()
        return {key: found.get(key) for key in ("CUDA_VISIBLE_DEVICES", "MEDLEY_DEVICE", "MEDLEY_TENSOR_PARALLEL")}

    with LocalStack(tmp_path / "data", workers=2, environ=environ) as stack:
        wanted = [
            {"CUDA_VISIBLE_DEVICES": names, "MEDLEY_DEVICE": "cuda", "MEDLEY_TENSOR_PARALLEL": "2"}
            for names in ("1,2", "3,4")
        ]
        assert [gpus(stack.pid("worker", i)) for i in range(2)] == wanted
        before = stack.kill("worker", 1)
        wait_until(lambda: stack.pids().get("worker.1", before) != before, "another worker")
        assert gpus(stack.pid("worker", 1)) == wanted[1]
        assert gpus(stack.pid("api"))["CUDA_VISIBLE_DEVICES"] is None


def test_where_there_are_too_few_gpus_nothing_starts_and_the_error_says_how_many_are_wanted(tmp_path: Path) -> None:
    environ = make_driver(tmp_path, num_gpus=3) | {"MEDLEY_DEVICE": "cuda", "MEDLEY_TENSOR_PARALLEL": "2"}
    with pytest.raises(StackFailed, match="GPUs: got 3, wanted 4: each of 2 workers has 2 GPUs of its own"):
        LocalStack(tmp_path / "data", workers=2, environ=environ).start()
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["up.log"]
