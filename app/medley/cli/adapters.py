"""`medley adapters add|list|show|share|unshare|grants|delete`."""

from __future__ import annotations

from pathlib import Path

import click

from medley.cli.service import MANY_RETRIES, Session, service_command
from medley.client import Adapter
from medley.client.adapters import Upload
from medley.client.progress import bar
from medley.spec.adapters import CONFIG_NAME


@click.group()
def adapters() -> None:
    """Upload and look at a tenant's adapters."""


@adapters.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", help="The adapter's name; the folder's where none is given.")
@click.option(
    "--parallel",
    type=click.IntRange(1, 32),
    default=8,
    show_default=True,
    help="Uploads at once, for a folder of folders.",
)
@service_command
def add(session: Session, folder: Path, name: str | None, parallel: int) -> None:
    """Upload a PEFT FOLDER, or a folder of such folders: what is there already is skipped."""
    with session.client(retries=MANY_RETRIES) as client:
        if (folder / CONFIG_NAME).exists():
            adapter = client.adapters.add(name or folder.resolve().name, folder)
            session.show(adapter, f"{adapter.full_name}@{adapter.revision}")
            return
        if name is not None:
            raise click.UsageError("--name is for one adapter; the sub-folders name theirs")
        uploads: list[Upload] = []
        total = len(list(folder.glob(f"*/{CONFIG_NAME}")))
        with bar("adapters", total) as show:

            def note(upload: Upload) -> None:
                uploads.append(upload)
                show(len(uploads))

            client.adapters.add_folder(folder, parallel=parallel, on_upload=note)
        refused = [u for u in uploads if u.error is not None]
        skipped = sum(u.is_skipped for u in uploads)
        summary = {"added": len(uploads) - skipped - len(refused), "skipped": skipped, "refused": len(refused)}
        errors = {upload.name: str(upload.error) for upload in refused}
        session.show(summary | {"errors": errors}, ", ".join(f"{count} {what}" for what, count in summary.items()))
        if refused:
            session.fail("\n".join(f"{name}: {error}" for name, error in errors.items()))
            raise SystemExit(1)


@adapters.command(name="list")
@click.option("--shared", is_flag=True, help="Those that other tenants share with this one.")
@service_command
def list_adapters(session: Session, shared: bool) -> None:
    """List the adapters, each with its newest revision."""
    with session.client() as client:
        found = client.adapters.list_shared() if shared else client.adapters.list()
        session.show_rows(found, ("name", "state", "rank", "bytes", "revision"), _row)


@adapters.command()
@click.argument("name")
@service_command
def show(session: Session, name: str) -> None:
    """Show one adapter."""
    with session.client() as client:
        adapter = client.adapters.get(name)
        session.show(adapter, "\n".join(f"{key}: {getattr(adapter, key)}" for key in adapter.__struct_fields__))


@adapters.command()
@click.argument("name")
@click.argument("tenant")
@click.option("--revision", help="This revision alone; every one, those to come too, where none is given.")
@service_command
def share(session: Session, name: str, tenant: str, revision: str | None) -> None:
    """Let TENANT use the adapter NAME, for which its jobs say `<your tenant>/NAME`."""
    with session.client() as client:
        grant = client.adapters.share(name, tenant, revision=revision)
        session.show(grant, f"{name}{f'@{revision}' if revision else ''} is shared with {tenant}")


@adapters.command()
@click.argument("name")
@click.argument("tenant")
@click.option("--revision", help="This revision alone; everything where none is given.")
@service_command
def unshare(session: Session, name: str, tenant: str, revision: str | None) -> None:
    """Share NAME with TENANT no longer: its jobs that wait fail, those that run end by themselves."""
    with session.client() as client:
        client.adapters.unshare(name, tenant, revision=revision)
        session.show({"adapter": name, "unshared": tenant}, f"{name} is not shared with {tenant} any more")


@adapters.command()
@click.argument("name")
@service_command
def grants(session: Session, name: str) -> None:
    """List with whom an adapter is shared."""
    with session.client() as client:
        session.show_rows(client.adapters.grants(name), ("tenant", "revision"), lambda g: (g.tenant, g.revision or "*"))


@adapters.command()
@click.argument("name")
@service_command
def delete(session: Session, name: str) -> None:
    """Hide an adapter from new jobs."""
    with session.client() as client:
        client.adapters.delete(name)
        session.show({"deleted": name}, f"deleted {name}")


def _row(adapter: Adapter) -> tuple[str, ...]:
    return adapter.full_name, adapter.state, str(adapter.max_rank), f"{adapter.size_bytes:,}", adapter.revision
