"""The embedded servers: their roles, their privacy, their death with their parent, their data's survival."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import psycopg
import pytest
from waiting import alive, wait_until

from medley.local.datadir import DataDir, DataDirInUse
from medley.local.embedded import EmbeddedServers

if TYPE_CHECKING:
    from conftest import Database

_HOLDER = """
import sys, time
from pathlib import Path
import psycopg
from medley.local.datadir import DataDir
from medley.local.embedded import EmbeddedServers

with EmbeddedServers(DataDir.acquire(Path(sys.argv[1]))) as servers:
    url = servers.database_url("medley_owner").replace("+psycopg", "")
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS kept (n int)")
        connection.execute("INSERT INTO kept VALUES (1)")
    # A session is open and a transaction is running when the end comes.
    busy = psycopg.connect(url)
    busy.execute("INSERT INTO kept VALUES (2)")
    print(servers.pid("postgres"), servers.pid("redis"), servers.data.runtime, flush=True)
    time.sleep(600)
"""


def test_a_clone_of_the_migrated_database_serves_every_role(database: Database) -> None:
    for role in ("medley_owner", "medley_api", "medley_work"):
        with psycopg.connect(database.url(role).replace("+psycopg", "")) as connection:
            row = connection.execute(
                "SELECT current_user::text, rolsuper, rolbypassrls FROM pg_roles WHERE rolname = current_user"
            ).fetchone()
        assert row is not None
        assert (row[0], row[1]) == (role, False)


def test_nobody_can_connect_as_superuser(embedded: EmbeddedServers) -> None:
    with pytest.raises(psycopg.OperationalError, match="rejects connection"):
        psycopg.connect(embedded.database_url("postgres").replace("+psycopg", ""))


def test_servers_listen_on_private_unix_sockets_only(embedded: EmbeddedServers) -> None:
    assert embedded.data.sockets.stat().st_mode & 0o777 == 0o700
    for name in ("postgres", "redis"):
        assert psutil.Process(embedded.pid(name)).net_connections("inet") == []


def test_servers_never_run_as_root(embedded: EmbeddedServers) -> None:
    for name in ("postgres", "redis"):
        process = psutil.Process(embedded.pid(name))
        assert 0 not in (*process.uids(), *process.gids())


def test_durability_is_on_unless_a_test_turns_it_off(tmp_path: Path) -> None:
    with (
        EmbeddedServers(DataDir.acquire(tmp_path / "data")) as servers,
        psycopg.connect(servers.database_url("medley_owner").replace("+psycopg", "")) as connection,
    ):
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            row = connection.execute("SELECT current_setting(%s)", (setting,)).fetchone()
            assert row == ("on",)


def test_a_killed_holder_leaves_no_process_and_its_data_intact(tmp_path: Path) -> None:
    data = tmp_path / "a folder with a name that is far too long for the path of a unix socket" / "data"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, str(data)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        postgres, redis, runtime = holder.stdout.readline().split()
        family = [psutil.Process(int(postgres)), psutil.Process(int(redis))]
        family += family[0].children(recursive=True)

        with pytest.raises(DataDirInUse, match=f"in use by process {holder.pid} since 20"):
            DataDir.acquire(data)
        assert Path(runtime).is_dir()
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    # Taken over at once, while the old servers may still be ending; a stale process id points elsewhere.
    with EmbeddedServers(DataDir.acquire(data)) as servers:
        url = servers.database_url("medley_owner").replace("+psycopg", "")
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT n FROM kept").fetchall() == [(1,)]
        wait_until(lambda: not alive(family), "the killed holder's servers to end")
        assert not Path(runtime).exists()


def test_a_process_id_that_came_back_as_another_program_does_not_block_a_start(tmp_path: Path) -> None:
    with EmbeddedServers(DataDir.acquire(tmp_path / "data"), durable=False) as servers:
        pgdata = servers.postgres.pgdata
        servers.kill("postgres")
        pid_file = pgdata / "postmaster.pid"
        lines = pid_file.read_text().split("\n")
        pid_file.write_text("\n".join([str(os.getpid()), *lines[1:]]))
        servers.start_postgres()
        assert servers.postgres.is_ready()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    data = DataDir.acquire(tmp_path / "data")
    with EmbeddedServers(data, durable=False) as servers:
        servers.stop("postgres")
        (servers.postgres.pgdata / "PG_VERSION").write_text("12\n")
        with pytest.raises(RuntimeError, match="incompatible"):
            servers.start_postgres()


def test_a_released_data_directory_can_be_acquired_again(tmp_path: Path) -> None:
    first = DataDir.acquire(tmp_path)
    first.release()
    first.release()
    assert not first.runtime.exists()
    DataDir.acquire(tmp_path).release()
