"""`dure runtime`: baselines of services."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from dure.client.cli import tables
from dure.client.cli.options import Pair, Shell, command, pairs
from dure.client.cli.output import dumps, emit, emit_list, to_value
from dure.client.runtimes import FILE_BYTES_MAX, read_runtime
from dure.v1.catalog_pb2 import Runtime


@click.group()
def runtime() -> None:
    """Runtimes: the command, port and probes that services begin with."""


class _Given(NamedTuple):
    """A runtime as its options say it, and which fields they say."""

    runtime: Runtime
    fields: list[str]


_OPTIONS = (
    click.option(
        "-f",
        "--file",
        type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
        help="Fields as YAML, JSON or TOML (by the end of its name), as `-o yaml` prints them; `-` is stdin.",
    ),
    click.option("--title", help="Name for people."),
    click.option("--command", "line", metavar="LINE", help="Command, split like a shell's words."),
    click.option("--port", type=click.IntRange(1, 65535), help="Port that the command listens on."),
    click.option("--health-path", metavar="PATH", help="HTTP path that is probed."),
    click.option("--initial-delay", "delay_s", type=float, help="Seconds without decisive probes."),
    click.option("-e", "--env", "environ", type=Pair(), multiple=True, help="Environment variables."),
    click.option(
        "--serial-start/--no-serial-start",
        default=None,
        help="Whether starts on one GPU come one after the other, because each measures what is free there.",
    ),
    click.option("-r", "--resource", "resources", type=Pair(), multiple=True, help="Default slots."),
)


def _options(function: Any) -> Any:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@command(runtime, "list", output=True)
async def list_(shell: Shell) -> None:
    """List the runtimes."""
    async with shell.client() as client:
        items = [item async for item in client.runtimes.list()]
    if shell.output in ("json", "yaml", "name"):
        emit_list("runtimes", items, shell.output)
    elif shell.quiet:
        for item in items:
            click.echo(tables.last(item.name))
    else:
        tables.show(_table(items, shell.output == "wide"), color=shell.color)


@command(runtime, "get", output=True)
@click.argument("name")
async def get(shell: Shell, name: str) -> None:
    """Show a runtime."""
    async with shell.client() as client:
        _show(shell, await client.runtimes.get(name), whole=True)


@command(runtime, "create", output=True)
@click.argument("name")
@_options
async def create(shell: Shell, name: str, **given: Any) -> None:
    """Add a runtime. Options win over the file."""
    wanted = _given(given)
    async with shell.client() as client:
        item = await client.runtimes.create(name, wanted.runtime)
    shell.say(f"runtime {name} created; next: `dure endpoint create NAME --model FOLDER --runtime {name}`")
    _show(shell, item)


@command(runtime, "update", output=True)
@click.argument("name")
@_options
async def update(shell: Shell, name: str, **given: Any) -> None:
    """Change what the file and the options say. Revisions that are there stay as they are."""
    wanted = _given(given)
    if not wanted.fields:
        raise click.UsageError("nothing to change: give -f FILE or an option such as --port")
    async with shell.client() as client:
        if given["health_path"] or given["delay_s"] is not None:
            # The options say a part of the health check: the rest stays.
            wanted = _merged(await client.runtimes.get(name), wanted, given)
        item = await client.runtimes.update(name, wanted.runtime, wanted.fields)
    shell.say(f"runtime {name} changed; endpoints made or updated from now on use it so")
    _show(shell, item)


@command(runtime, "delete")
@click.argument("name")
async def delete(shell: Shell, name: str) -> None:
    """Remove a runtime that was added."""
    async with shell.client() as client:
        await client.runtimes.delete(name)
    shell.say(f"runtime {name} deleted")


def _given(given: dict[str, Any]) -> _Given:
    item, fields = Runtime(), list[str]()
    if given["file"] is not None:
        with click.open_file(str(given["file"]), encoding="utf-8") as file:
            item, fields = read_runtime(file.read(FILE_BYTES_MAX), str(given["file"]))
    if given["title"] is not None:
        item.title = given["title"]
        fields.append("title")
    if given["line"] is not None:
        try:
            words = shlex.split(given["line"])
        except ValueError as error:
            raise click.UsageError(f"--command: {error}") from error
        item.ClearField("start_command")
        item.start_command.args.extend(words)
        fields.append("start_command")
    if given["port"] is not None:
        item.port = given["port"]
        fields.append("port")
    if given["health_path"] is not None:
        item.health_check.path = given["health_path"]
        fields.append("health_check")
    if given["delay_s"] is not None:
        item.health_check.initial_delay_s = given["delay_s"]
        fields.append("health_check")
    if given["serial_start"] is not None:
        item.serial_start = given["serial_start"]
        fields.append("serial_start")
    for option, field in (("environ", "environ"), ("resources", "resource_slots")):
        if given[option]:
            getattr(item, field).update(pairs("-e" if option == "environ" else "-r", given[option]))
            fields.append(field)
    return _Given(item, list(dict.fromkeys(fields)))


def _merged(before: Runtime, wanted: _Given, given: dict[str, Any]) -> _Given:
    check = type(before.health_check)()
    check.CopyFrom(before.health_check)
    check.MergeFrom(wanted.runtime.health_check)
    if given["delay_s"] is not None:
        check.initial_delay_s = given["delay_s"]
    wanted.runtime.health_check.CopyFrom(check)
    return wanted


def _show(shell: Shell, item: Runtime, *, whole: bool = False) -> None:
    if shell.output in ("json", "yaml", "name"):
        emit(item, shell.output)
    elif shell.output:
        tables.show(_table([item], shell.output == "wide"), color=shell.color)
    elif whole:
        click.echo(dumps(_without_nothing(to_value(item)), "yaml"))


def _without_nothing(value: dict[str, Any]) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if inner not in (None, "", 0, [], {}, False)}


def _table(items: Sequence[Runtime], wide: bool) -> tables.Table:
    header = ["NAME", "TITLE", "PORT", "HEALTH", "FROM"] + (["COMMAND"] if wide else [])
    rows = []
    for item in items:
        origin = "Dure" if item.builtin else "an administrator"
        port = str(item.port) if item.port else "file" if item.reads_model_definition else "request"
        row = [tables.last(item.name), item.title, port, _health(item), origin]
        rows.append([*row, *([_command(item)] if wide else [])])
    return tables.Table(header, list(rows))


def _health(item: Runtime) -> str:
    if item.HasField("health_check"):
        return item.health_check.path
    return "file" if item.reads_model_definition else "request"


def _command(item: Runtime) -> str:
    if item.reads_model_definition:
        return "as the model definition says"
    start = item.start_command
    return start.line or shlex.join(start.args) or "the image's own"
