"""compose.yaml is what the table of processes says, is valid, and each of its services starts and gets well."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from medley.cli.up import DEMO_MODEL
from medley.local.child import Child, Command
from medley.local.compose import compose, render
from medley.local.processes import PROCESSES

if TYPE_CHECKING:
    from conftest import Database

_ROOT = Path(__file__).resolve().parents[2]
_FILE = _ROOT / "compose.yaml"
_ENV = {"MEDLEY_MODEL_DIR": "/srv/model"}
_COMPOSE: dict[str, Any] = yaml.safe_load(_FILE.read_text())
_SERVICES: dict[str, Any] = _COMPOSE["services"]
_OURS = [name for name, service in _SERVICES.items() if "build" in service and name != "worker"]


def test_the_file_is_what_the_table_says() -> None:
    assert _FILE.read_text() == render(), "run: make compose"
    assert yaml.safe_load(_FILE.read_text()) == compose()


def test_docker_compose_accepts_the_file() -> None:
    """Where docker-compose is absent, the structure alone is checked, and a warning in the output says so."""
    assert {spec.name for spec in PROCESSES} <= set(_SERVICES)
    for service in _SERVICES.values():
        assert set(service.get("depends_on", {})) <= set(_SERVICES)
        for path in re.findall(r"\./[^:]+", " ".join(service.get("volumes", []))):
            assert (_ROOT / path).is_file()
        if "build" in service:
            assert (_ROOT / service["build"]["dockerfile"]).is_file()
    program = shutil.which("docker-compose")
    if program is None:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn("docker-compose is absent: compose.yaml was checked for its structure only", stacklevel=1)
        return
    # docker-compose has a Python of its own, which must not see ours.
    env = {**_ENV, "PATH": os.defpath, "HOME": "/nonexistent"}
    command = [program, "--profile", "gpu", "--profile", "cpu", "config"]
    done = subprocess.run(command, cwd=_ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(yaml.safe_load(done.stdout)["services"]) == set(_SERVICES)


def test_every_password_is_a_file_that_its_services_alone_are_given() -> None:
    held = {name: set(service.get("secrets", [])) for name, service in _SERVICES.items()}
    assert set.union(*held.values()) == set(_COMPOSE["secrets"])
    for name, service in _SERVICES.items():
        named = set(re.findall(r"/run/secrets/(\w+)", str(service)))
        # PostgreSQL's own script reads the owner's.
        assert held[name] == named | ({"owner_password"} if name == "postgres" else set()), name
    assert held["api"] == {"api_password", "redis_password"}
    assert held["worker"] == held["dispatcher"] == {"work_password", "redis_password"}
    assert "/run/secrets/owner_password" in (_ROOT / "app/medley/local/owner_password.sql").read_text()
    # A value would stand here, or in the environment, for all to read.
    for service in _SERVICES.values():
        assert [key for key in service.get("environment", {}) if key.endswith("PASSWORD")] == []
        assert "${" not in str(service.get("command"))


def test_redis_takes_its_password_from_the_file(tmp_path: Path) -> None:
    """The commands as they stand, with echo for the server."""
    (tmp_path / "redis_password").write_text("kEwp3vT0\n")
    command = _SERVICES["redis"]["command"][-1].replace("$$", "$").replace("/run/secrets", str(tmp_path))
    command = (
        command.replace("/tmp/redis.conf", str(tmp_path / "redis.conf"))
        .replace("exec docker-entrypoint.sh redis-server", "cat")
        .replace("chown redis", "true")
    )
    done = subprocess.run(["sh", "-c", command.partition(" --save")[0]], capture_output=True, text=True, check=True)
    assert done.stdout == "requirepass kEwp3vT0\n"
    assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0


def test_no_server_is_reachable_from_outside_but_the_api() -> None:
    assert [name for name, service in _SERVICES.items() if "ports" in service] == ["api"]


@pytest.mark.parametrize("name", _OURS)
def test_a_service_starts_with_its_own_command_and_gets_well(
    name: str, database: Database, redis_url: str, store_url: str, tmp_path: Path
) -> None:
    """The worker for CUDA differs from worker-cpu in its image and device alone."""
    service = _SERVICES[name]
    role = re.match(r"postgresql\+psycopg://(\w+)@", service["environment"]["MEDLEY_DATABASE_URL"])
    assert role is not None
    here = {
        "MEDLEY_DATABASE_URL": database.url(role[1]),
        "MEDLEY_REDIS_URL": redis_url,
        "MEDLEY_STORE_URL": store_url,
        "MEDLEY_MODEL": str(DEMO_MODEL),
        "MEDLEY_HEALTH_FILE": str(tmp_path / "beat"),
        "MEDLEY_HOST": "127.0.0.1",
        "MEDLEY_PORT": "0",
    }
    for secret in service["secrets"]:
        (tmp_path / secret).write_text("kEwp3vT0\n")
    given = {
        k: "" if "${" in v else v.replace("/run/secrets", str(tmp_path))
        for k, v in service["environment"].items()
        # The test's Redis has no password, and takes none.
        if k not in here and k != "MEDLEY_REDIS_PASSWORD_FILE"
    }
    env = {**os.environ, **given, **{k: v for k, v in here.items() if k in service["environment"]}}
    if "ports" in service:
        env["MEDLEY_PORT"] = str(_free_port())
    log_path = tmp_path / "log"
    with log_path.open("wb") as log:
        child = Child(Command(name=name, argv=_argv(service["command"]), env=env), output=log.fileno())
    try:
        if name == "migrate":
            assert child.wait(60) == 0, log_path.read_text()
            return
        check = service["healthcheck"]["test"]
        assert check[0] == "CMD"
        deadline = time.monotonic() + 60
        while subprocess.run(_argv(check[1:]), env=env, capture_output=True, check=False).returncode != 0:
            assert child.exit_status() is None, log_path.read_text()
            assert time.monotonic() < deadline, f"not well after 60 s:\n{log_path.read_text()}"
    finally:
        status = child.stop(30)
    assert status in (0, -15), log_path.read_text()


def _argv(command: list[str]) -> tuple[str, ...]:
    assert command[0] == "medley"
    return (sys.executable, "-m", *command)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
