"""The command `medley`. Each subcommand's module is loaded only when that subcommand runs.

So the base install, which holds the client alone, has a working command line, and a server process imports
nothing that it does not use.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

import click

from medley.environment import ConfigError

# name: (where, what it says in `medley --help`), in that order.
COMMANDS = {
    "submit": ("medley.cli.jobs:submit", "Submit a prompt or a file of jobs."),
    "status": ("medley.cli.jobs:status", "Show a job, a batch or a sweep."),
    "results": ("medley.cli.jobs:results", "Print results as they finish."),
    "cancel": ("medley.cli.jobs:cancel", "Cancel a job, a batch or a sweep."),
    "pause": ("medley.cli.changes:pause", "Hold a batch or a sweep."),
    "resume": ("medley.cli.changes:resume", "Let a paused batch or sweep go on."),
    "update": ("medley.cli.changes:update", "Change priority and deadline of a batch or a sweep."),
    "retry": ("medley.cli.changes:retry", "Run jobs that ended without a result again."),
    "usage": ("medley.cli.usage:usage", "Show the tokens used, by day or adapter."),
    "webhooks": ("medley.cli.webhooks:webhooks", "Be told when batches and sweeps finish."),
    "adapters": ("medley.cli.adapters:adapters", "Add, list and show adapters."),
    "sweep": ("medley.cli.sweeps:sweep", "Run prompts over many adapters, report per adapter, compare."),
    "keys": ("medley.cli.keys:keys", "Make, rotate and revoke API keys."),
    "limits": ("medley.cli.audit:limits", "Show what the tenant may have, and what it has."),
    "audit": ("medley.cli.audit:audit", "Show who changed what by hand."),
    "demo": ("medley.cli.demo:demo", "Run a bulk evaluation over the demo's adapters, servers included."),
    "simulate": ("medley.cli.simulate:simulate", "Replay a trace on virtual workers, before paying for GPUs."),
    "up": ("medley.cli.up:up", "Run everything on this machine."),
    "tenants": ("medley.cli.tenants:tenants", "Add tenants, show them, set limits and retention, delete them."),
    "fleet": ("medley.cli.fleet:fleet", "Show the workers; drain, put to sleep, wake and release them."),
    "top": ("medley.cli.top:top", "Show the running batches by tenant and adapter, as they change."),
    "backup": ("medley.cli.backup:backup", "Write all of a `medley up` into a folder or a stream."),
    "restore": ("medley.cli.backup:restore", "Make a data directory from a backup."),
    "migrate": ("medley.cli.processes:migrate", "Bring the database to the newest schema."),
    "api": ("medley.cli.processes:api", "Run the HTTP API."),
    "dispatcher": ("medley.cli.processes:dispatcher", "Run the dispatcher."),
    "tasks": ("medley.cli.processes:tasks", "Run the worker of CPU tasks."),
    "worker": ("medley.cli.processes:worker", "Run a GPU worker."),
    "health": ("medley.cli.processes:health", "Say whether the process in this container is well."),
}


class LazyGroup(click.Group):
    """A group whose members are named in `COMMANDS` and imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        try:
            return cast(click.Command, getattr(importlib.import_module(module), attribute))
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing == "medley":
                raise
            raise click.ClickException(
                f"`medley {cmd_name}` needs the package {missing}: pip install 'medley[local,worker]'"
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """From the table: help imports nothing."""
        rows = [(name, text) for name, (_, text) in COMMANDS.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="medley")
def main() -> None:
    """Batch inference for hundreds of LoRA adapters on one base model."""
