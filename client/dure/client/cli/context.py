"""`dure context`: which manager to talk to, as whom."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dure.client.cli.output import dumps
from dure.client.context import DEFAULT_PROJECT, Context, context_path, load_context, save_context
from dure.wire.errors import DureError

CONTEXT_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def context() -> None:
    """Which manager to talk to, as whom."""


@context.command("show")
@click.option("--context", "path", type=CONTEXT_FILE, help="Another context file.")
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), help="Form of the output.")
@click.option("--show-key", is_flag=True, help="Print the API key, too.")
def show(path: Path | None, output: str | None, show_key: bool) -> None:
    """Show the current context."""
    path = path or context_path()
    current = load_context(path)
    key = current.api_key if show_key else f"{current.api_key[:9]}..."
    if output in ("json", "yaml"):
        facts = {"file": str(path), "manager": current.manager, "api_key": key, "project": current.project}
        click.echo(dumps(facts, output))
        return
    click.echo(f"file:     {path}\nmanager:  {current.manager}\napi key:  {key}\nproject:  {current.project}")


@context.command("set")
@click.option("--context", "path", type=CONTEXT_FILE, help="Another context file.")
@click.option("--manager", metavar="HOST:PORT", help="Where the manager is.")
@click.option(
    "--api-key", metavar="KEY", help="Who calls it; `-` reads it from stdin, so that no `ps` shows it."
)
@click.option("--project", metavar="NAME", help="Project of the resources that commands name.")
def set_(path: Path | None, manager: str | None, api_key: str | None, project: str | None) -> None:
    """Set the context, or change parts of it."""
    path = path or context_path()
    if manager is None and api_key is None and project is None:
        raise click.UsageError("nothing to set: give --manager, --api-key or --project")
    if manager is not None:
        host, _, port = manager.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise click.BadParameter(f"`{manager}` does not have the form HOST:PORT", param_hint="--manager")
    if api_key == "-":
        api_key = sys.stdin.readline().strip()
    try:
        before = load_context(path)
    except DureError:
        if manager is None or api_key is None:
            raise click.UsageError(
                f"{path} holds no whole context yet: give both --manager and --api-key"
            ) from None
        before = Context(manager=manager, api_key=api_key)
    save_context(
        path,
        Context(
            manager=manager or before.manager,
            api_key=api_key or before.api_key,
            project=project or before.project or DEFAULT_PROJECT,
        ),
    )
    click.echo(f"context written to {path}; `dure doctor` tries it", err=True)
