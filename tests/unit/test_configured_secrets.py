"""Secrets and connections as processes are given them: from files, never shown, refused where a door stands open."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from medley.cli import main
from medley.config import (
    SECRET_KEYS,
    Settings,
    database_url_from_env,
    inherited_env,
    role_passwords_from_env,
    store_access_from_env,
)
from medley.environment import ConfigError

LOCAL = {
    "MEDLEY_DATABASE_URL": "postgresql+psycopg://medley_api@/medley?host=/tmp/s",
    "MEDLEY_REDIS_URL": "unix:///tmp/s/redis.sock",
    "MEDLEY_STORE_URL": "file:///store",
}
GOOD = "kEwp3vT0"


def settings(**environ: str) -> Settings:
    return Settings.from_env(LOCAL | {f"MEDLEY_{key}": value for key, value in environ.items()})


def test_private_sockets_need_neither_password_nor_encryption() -> None:
    found = settings()
    assert found.database_url == LOCAL["MEDLEY_DATABASE_URL"]
    assert found.redis_url == LOCAL["MEDLEY_REDIS_URL"]


def test_secrets_come_from_files_less_the_end_of_the_line(tmp_path: Path) -> None:
    (tmp_path / "url").write_text(f"rediss://:{GOOD}@redis/0\n")
    (tmp_path / "password").write_text("p@ss/w:rd%\r\n")
    found = settings(
        REDIS_URL="",
        REDIS_URL_FILE=str(tmp_path / "url"),
        DATABASE_URL="postgresql://medley_api@db:5433/medley",
        DATABASE_PASSWORD_FILE=str(tmp_path / "password"),
        DATABASE_SSLMODE="verify-full",
        DATABASE_SSLROOTCERT="/etc/ca file.pem",
    )
    assert found.redis_url == f"rediss://:{GOOD}@redis/0?ssl_cert_reqs=required"
    assert found.database_url == (
        "postgresql://medley_api:p%40ss%2Fw%3Ard%25@db:5433/medley?sslmode=verify-full&sslrootcert=/etc/ca+file.pem"
    )
    from sqlalchemy import make_url

    url = make_url(found.database_url)
    assert (url.password, url.query["sslrootcert"]) == ("p@ss/w:rd%", "/etc/ca file.pem")


@pytest.mark.parametrize("key", sorted(SECRET_KEYS))
def test_a_secret_that_is_given_twice_or_not_readable_is_refused_by_its_key(key: str, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("hush-hush")

    def read(environ: dict[str, str]) -> None:
        Settings.from_env(LOCAL | environ)
        role_passwords_from_env(environ)
        store_access_from_env(environ)

    with pytest.raises(ConfigError, match=f"{key}_FILE") as caught:
        read({key: "hush-hush", f"{key}_FILE": str(file)})
    assert "hush" not in str(caught.value)
    without = {name: "" for name in LOCAL if name == key}
    for bad in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match=f"{key}_FILE: got .*can be read"):
            read(without | {f"{key}_FILE": str(bad)})
    file.write_text("\n")
    with pytest.raises(ConfigError, match=f"{key}_FILE: .*not empty"):
        read(without | {f"{key}_FILE": str(file)})


def test_a_password_in_the_url_and_beside_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="MEDLEY_REDIS_PASSWORD") as caught:
        settings(REDIS_URL="redis://:hush@127.0.0.1", REDIS_PASSWORD="hush")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("DATABASE_URL", "postgresql://medley_api@127.0.0.1/medley"),
        ("DATABASE_URL", "postgresql://medley_api:@127.0.0.1/medley"),
        ("DATABASE_URL", "postgresql://medley_api:Postgres@127.0.0.1/medley"),
        ("DATABASE_URL", "postgresql://medley_api:medley_api@127.0.0.1/medley"),
        ("DATABASE_URL", "postgresql://medley_api@/medley?host=localhost"),
        ("REDIS_URL", "redis://127.0.0.1"),
        ("REDIS_URL", "redis://:%20@127.0.0.1"),
        ("REDIS_URL", "rediss://:changeme@redis"),
    ],
)
def test_an_empty_or_default_password_is_refused_unless_that_is_allowed(key: str, url: str) -> None:
    with pytest.raises(ConfigError, match=f"MEDLEY_{key}: got <secret>, wanted a password that is neither"):
        settings(**{key: url})
    settings(**{key: url}, ALLOW_WEAK_SECRETS="true")


@pytest.mark.parametrize(
    ("key", "url", "wanted"),
    [
        ("DATABASE_URL", f"postgresql://a:{GOOD}@db/medley", "sslmode=verify-full"),
        ("DATABASE_URL", f"postgresql://a:{GOOD}@db/medley?sslmode=prefer", "sslmode=verify-full"),
        ("DATABASE_URL", f"postgresql://a:{GOOD}@db/medley?sslmode=disable", "sslmode=verify-full"),
        ("DATABASE_URL", f"postgresql://a:{GOOD}@/medley?host=db", "sslmode=verify-full"),
        ("DATABASE_URL", f"postgresql://a:{GOOD}@/medley?host=/tmp,db:5433", "sslmode=verify-full"),
        ("DATABASE_URL", f"postgresql://a:{GOOD}@localhost/medley?hostaddr=10.0.0.1", "sslmode=verify-full"),
        ("REDIS_URL", f"redis://:{GOOD}@redis", "rediss"),
        ("REDIS_URL", f"redis://:{GOOD}@10.0.0.1", "rediss"),
        ("REDIS_URL", f"rediss://:{GOOD}@redis?ssl_cert_reqs=none", "rediss"),
    ],
)
def test_a_connection_that_leaves_the_machine_unencrypted_is_refused_unless_its_host_is_named(
    key: str, url: str, wanted: str
) -> None:
    with pytest.raises(ConfigError, match=f"MEDLEY_{key}: got <secret>, wanted {wanted}") as caught:
        settings(**{key: url})
    assert GOOD not in str(caught.value)
    settings(**{key: url}, PLAINTEXT_HOSTS="db, redis,10.0.0.1")


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("DATABASE_URL", f"postgresql://a:{GOOD}@127.0.0.2:5/medley"),
        ("DATABASE_URL", f"postgresql://a:{GOOD}@[::1]/medley"),
        ("DATABASE_URL", f"postgresql://a:{GOOD}@db/medley?sslmode=verify-ca"),
        ("DATABASE_URL", "postgresql://a@db/medley?sslmode=verify-full&sslcert=/c&sslkey=/k"),
        ("REDIS_URL", f"redis://:{GOOD}@localhost"),
        ("REDIS_URL", f"rediss://u:{GOOD}@redis:6380/1"),
    ],
)
def test_what_is_safe_is_taken(key: str, url: str) -> None:
    settings(**{key: url})
    environ = {"MEDLEY_DATABASE_URL": url}
    assert key != "DATABASE_URL" or database_url_from_env(environ) == url


def test_a_certificate_for_a_redis_without_encryption_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="MEDLEY_REDIS_URL: got <secret>, wanted rediss://"):
        settings(REDIS_URL=f"redis://:{GOOD}@localhost", REDIS_CA="/ca.pem")
    with pytest.raises(ConfigError, match="MEDLEY_DATABASE_SSLMODE: got 'maybe'"):
        settings(DATABASE_SSLMODE="maybe")


@pytest.mark.parametrize("command", ["api", "dispatcher", "tasks", "worker", "migrate"])
def test_no_process_starts_on_what_is_refused(command: str) -> None:
    environ = LOCAL | {"MEDLEY_DATABASE_URL": "postgresql://medley_api:postgres@127.0.0.1/medley"}
    done = CliRunner().invoke(main, [command], env=environ)
    assert done.exit_code == 1
    assert "MEDLEY_DATABASE_URL: got <secret>" in done.output
    assert "postgresql://" not in done.output


def test_the_roles_passwords_are_read_and_judged(tmp_path: Path) -> None:
    file = tmp_path / "p"
    file.write_text(f"{GOOD}\n")
    environ = {"MEDLEY_API_PASSWORD_FILE": str(file), "MEDLEY_WORK_PASSWORD": f"{GOOD}2"}
    assert role_passwords_from_env(environ) == {"MEDLEY_API_PASSWORD": GOOD, "MEDLEY_WORK_PASSWORD": f"{GOOD}2"}
    assert role_passwords_from_env({}) == {}
    with pytest.raises(ConfigError, match="MEDLEY_WORK_PASSWORD: got <secret>"):
        role_passwords_from_env({"MEDLEY_WORK_PASSWORD": "password"})


def test_children_of_a_process_inherit_none_of_its_secrets() -> None:
    keys = {*SECRET_KEYS, *(f"{key}_FILE" for key in SECRET_KEYS), "MEDLEY_DATABASE_SSLKEY", "MEDLEY_REDIS_CA"}
    assert inherited_env(dict.fromkeys(keys, "x") | {"MEDLEY_LEASE_S": "3", "PATH": "/bin"}) == {
        "MEDLEY_LEASE_S": "3",
        "PATH": "/bin",
    }
