"""`dure context`: which manager to talk to, as whom. Contexts with a name can be kept, and one be used."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dure.client.cli import tables
from dure.client.cli.options import ContextFile
from dure.client.cli.output import dumps
from dure.client.cli.tables import Table
from dure.client.context import (
    CONTEXT_NAME,
    DEFAULT_PROJECT,
    Context,
    context_path,
    load_context,
    save_context,
    saved_contexts,
    saved_path,
)
from dure.wire.errors import DureError, InvalidInput, NotFound

_OWN_NAME = "default"


@click.group()
def context() -> None:
    """Which manager to talk to, as whom."""


_file = click.option("--context", "path", type=ContextFile(), help="Another context: its name, or its file.")
_output = click.option(
    "-o", "--output", type=click.Choice(["table", "json", "yaml"]), help="Form of the output."
)
_manager = click.option("--manager", metavar="HOST:PORT", help="Where the manager is.")
_api_key = click.option(
    "--api-key", metavar="KEY", help="Who calls it; `-` reads it from stdin, so that no `ps` shows it."
)
_project = click.option("--project", metavar="NAME", help="Project of the resources that commands name.")


@context.command("show")
@_file
@_output
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
@_file
@_manager
@_api_key
@_project
def set_(path: Path | None, manager: str | None, api_key: str | None, project: str | None) -> None:
    """Set the context, or change parts of it."""
    path = path or context_path()
    if manager is None and api_key is None and project is None:
        raise click.UsageError("nothing to set: give --manager, --api-key or --project")
    try:
        before = load_context(path)
    except DureError:
        before = None
    after = _changed(before, manager, api_key, project, f"{path} holds no whole context yet")
    # The current one may be a copy of one that has a name: that is meant, too.
    same = [] if before is None or path != context_path() else _files_like(before)
    for file in (path, *same):
        save_context(file, after)
    click.echo(f"context written to {path}; `dure doctor` tries it", err=True)


@context.command("add")
@click.argument("name")
@_manager
@_api_key
@_project
@click.option("--force", is_flag=True, help="Replace one that has the name.")
def add(name: str, manager: str | None, api_key: str | None, project: str | None, force: bool) -> None:
    """Keep a context under a name. What is not given is as in the current one."""
    path = _path(name)
    if path.exists() and not force:
        raise click.UsageError(f"there is a context `{name}` already; --force replaces it")
    try:
        current = load_context()
    except DureError:
        current = None
    save_context(path, _changed(current, manager, api_key, project, "there is no current context"))
    click.echo(f"context {name} kept; `dure context use {name}` makes it the current one", err=True)


@context.command("use")
@click.argument("name")
def use(name: str) -> None:
    """Make a context that has a name the current one."""
    wanted = load_context(_existing(name))
    path = context_path()
    if path.exists():
        _keep(path)
    save_context(path, wanted)
    click.echo(f"context {name} is the current one: {wanted.manager}, project {wanted.project}", err=True)


@context.command("list")
@_output
def list_(output: str | None) -> None:
    """List the contexts that have a name; `*` marks the current one."""
    try:
        current = load_context()
    except DureError:
        current = None
    found = []
    for name, path in saved_contexts().items():
        try:
            each = load_context(path)
        except DureError as error:
            click.echo(f"warning: {error.message}", err=True)
            continue
        found.append((name, each))
    if output in ("json", "yaml"):
        facts = [
            {"name": name, "manager": each.manager, "project": each.project, "current": each == current}
            for name, each in found
        ]
        click.echo(dumps({"contexts": facts}, output))
    elif found:
        rows = [
            ["*" if each == current else "", name, each.manager, f"{each.api_key[:9]}...", each.project]
            for name, each in found
        ]
        header = ["", "NAME", "MANAGER", "API KEY", "PROJECT"]
        tables.show(Table(header, list(rows)), color=False)
    else:
        click.echo("No context has a name. `dure context add NAME --api-key KEY` keeps one.", err=True)


@context.command("remove")
@click.argument("name")
def remove(name: str) -> None:
    """Forget a context that has a name. The current one stays, even if it is a copy of it."""
    _existing(name).unlink()
    click.echo(f"context {name} removed", err=True)


def _changed(
    before: Context | None, manager: str | None, api_key: str | None, project: str | None, why: str
) -> Context:
    if manager is not None:
        host, _, port = manager.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise click.BadParameter(f"`{manager}` does not have the form HOST:PORT", param_hint="--manager")
    if api_key == "-":
        api_key = sys.stdin.readline().strip()
    if api_key == "":
        raise click.BadParameter("the key is empty", param_hint="--api-key")
    if before is None:
        if manager is None or api_key is None:
            raise click.UsageError(f"{why}: give both --manager and --api-key")
        before = Context(manager=manager, api_key=api_key)
    return Context(
        manager=manager or before.manager,
        api_key=api_key or before.api_key,
        project=project or before.project or DEFAULT_PROJECT,
    )


def _path(name: str) -> Path:
    if not CONTEXT_NAME.fullmatch(name):
        raise click.BadParameter(
            f"`{name}` is not a name: 1 to 64 letters, digits, `-` and `_`", param_hint="NAME"
        )
    return saved_path(name)


def _existing(name: str) -> Path:
    path = _path(name)
    if not path.exists():
        known = ", ".join(saved_contexts()) or "none"
        raise NotFound(f"no context `{name}`; there are: {known}", reason="CONTEXT_NOT_FOUND")
    return path


def _files_like(wanted: Context) -> list[Path]:
    """Files of contexts with a name that say the same."""
    found = []
    for path in saved_contexts().values():
        try:
            if load_context(path) == wanted:
                found.append(path)
        except DureError:
            # It is no copy, whatever is wrong with it; `list` tells.
            continue
    return found


def _keep(path: Path) -> None:
    """Gives the current context a name if it has none: its key may be written down nowhere else."""
    current = load_context(path)
    if _files_like(current):
        return
    kept = saved_path(_OWN_NAME)
    if kept.exists():
        raise InvalidInput(
            "the current context has no name and would be lost; keep it first: dure context add NAME",
            reason="CONTEXT_UNNAMED",
        )
    save_context(kept, current)
    click.echo(f"the context used so far is kept as {_OWN_NAME}", err=True)
