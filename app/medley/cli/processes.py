"""One command a process: what each row of the table of processes starts.

Each reads its configuration from the environment, sets up its logs and calls its one entry point.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import sys

import click

from medley import logs
from medley.config import (
    Settings,
    database_url_from_env,
    log_format_from_env,
    role_passwords_from_env,
)
from medley.environment import ConfigError
from medley.health import is_alive
from medley.local.processes import Health, process


@click.command()
def api() -> None:
    """Run the HTTP API (as medley_api)."""
    from medley.api.server import serve

    settings = Settings.from_env()
    logs.configure("api", settings)
    serve(settings)


@click.command()
def dispatcher() -> None:
    """Run the dispatcher (as medley_work)."""
    from medley.dispatcher.loop import run

    settings = Settings.from_env()
    logs.configure("dispatcher", settings)
    run(settings)


@click.command()
def tasks() -> None:
    """Run the Celery worker of CPU tasks (as medley_work)."""
    from medley.tasks.worker import run

    settings = Settings.from_env()
    logs.configure("tasks", settings)
    run(settings)


@click.command()
def worker() -> None:
    """Run a GPU worker (as medley_work); it needs the package medley_worker."""
    settings = Settings.from_env()
    if settings.model is None:
        raise ConfigError("MEDLEY_MODEL", None, "the folder of the base model")
    if importlib.util.find_spec("medley_worker") is None:
        raise click.ClickException("medley_worker is not installed: pip install 'medley[worker]'")
    # By name and in its place: the control plane never imports the data plane.
    os.execv(sys.executable, [sys.executable, "-m", "medley_worker.shell"])


@click.command()
@click.option(
    "--restored", is_flag=True, help="The database comes from a backup: end what its workers and leaders held."
)
def migrate(restored: bool) -> None:
    """Bring the database to the newest schema (as medley_owner)."""
    from medley.db.migrate import upgrade
    from medley.db.recovery import fence

    url = database_url_from_env()
    if url is None:
        raise ConfigError("MEDLEY_DATABASE_URL", None, "the URL of the role medley_owner")
    # The migrations read these two, and know nothing of files.
    os.environ.update(role_passwords_from_env())
    logs.configure("migrate", format=log_format_from_env())
    if restored:
        fence(url)
    upgrade(url)


@click.command()
@click.argument("name")
def health(name: str) -> None:
    """Exit with status 0 where the process NAME of this container is well."""
    settings = Settings.from_env()
    try:
        spec = process(name)
    except KeyError:
        raise click.BadParameter(f"no process {name}", param_hint="NAME") from None
    if spec.health is Health.HTTP:
        connection = http.client.HTTPConnection("127.0.0.1", settings.port, timeout=5)
        connection.request("GET", "/readyz")
        well = connection.getresponse().status == 200
    else:
        well = settings.health_file is not None and is_alive(settings.health_file)
    raise SystemExit(0 if well else 1)
