"""`medley tenants`: who may use the service, for its operator."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError

from medley.config import DEFAULT_DATA_DIR, database_url_from_env
from medley.db.tenants import add_tenant
from medley.local.status import read_status


@click.group()
def tenants() -> None:
    """Add tenants and make their API keys (as medley_owner)."""


@tenants.command()
@click.argument("name")
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DATA_DIR,
    show_default=True,
    help="Of the running `medley up`, unless MEDLEY_DATABASE_URL is set.",
)
@click.option("--json", "as_json", is_flag=True, help="As a JSON object.")
def add(name: str, data_dir: Path, as_json: bool) -> None:
    """Make the tenant NAME where it is new, and print a new API key for it (shown this once)."""
    url = database_url_from_env()
    if url is None:
        status = read_status(data_dir)
        if status is None:
            raise click.ClickException(
                f"no `medley up` runs on {data_dir}: give its --data-dir, or set MEDLEY_DATABASE_URL"
            )
        url = status.database_urls["medley_owner"]
    engine = create_engine(url)
    try:
        with engine.begin() as connection:
            key = add_tenant(connection, name)
        click.echo(msgspec.json.encode({"tenant": name, "api_key": key}) if as_json else key)
    except IntegrityError:
        raise click.BadParameter(
            f"got {name!r}, wanted up to 63 of a-z, 0-9, _ and -, beginning with a letter or digit",
            param_hint="NAME",
        ) from None
    finally:
        engine.dispose()
