"""`dure registry`: credentials for registries of images."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import click

from dure.client.cli import tables
from dure.client.cli.answers import show_list, show_one
from dure.client.cli.options import Shell, command
from dure.client.cli.tables import Table
from dure.client.cli.text import age
from dure.v1.registry_pb2 import Registry
from dure.wire.images import registry_host

# More than a manager takes: what is piped in by mistake is not read to its end.
PASSWORD_READ_MAX = 64 * 1024


@click.group()
def registry() -> None:
    """Credentials for registries of images.

    HOST is what images begin with, such as ghcr.io or registry.example.com:5000; docker.io is for those that
    name no registry.
    """


def _checked(_: click.Context, __: click.Parameter, text: str) -> str:
    """Before a password is asked for."""
    if text.startswith("projects/"):
        return text
    try:
        return registry_host(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


_host = click.argument("host", callback=_checked)


@command(registry, "set", output=True)
@_host
@click.option("-u", "--username", required=True, metavar="NAME", help="User at the registry.")
@click.option("--password-stdin", is_flag=True, help="Read the password or token from stdin.")
async def set_(shell: Shell, host: str, username: str, password_stdin: bool) -> None:
    """Keep a credential, in place of one for the same registry.

    The password is asked for, or read from stdin: `dure registry set ghcr.io -u me --password-stdin < token`.
    It is kept sealed and never shown again; agents get it when they fetch an image of the project.
    """
    password = _from_stdin() if password_stdin else _asked(host)
    async with shell.client() as client:
        item = await client.registries.set(host, username, password)
    shell.say(f"credential for {tables.last(item.name)} kept; it is used from the next start of a replica on")
    show_one(shell, item, _table)


@command(registry, "list", output=True)
async def list_(shell: Shell) -> None:
    """List the registries that the project has credentials for."""
    async with shell.client() as client:
        empty = "No registries. `dure registry set HOST --username NAME` keeps a credential for one."
        await show_list(shell, "registries", client.registries.list(), _table, empty)


@command(registry, "delete")
@_host
async def delete(shell: Shell, host: str) -> None:
    """Forget a credential. What runs goes on; images that nodes have stay there."""
    async with shell.client() as client:
        await client.registries.delete(host)
    shell.say(f"credential for {tables.last(host)} deleted")


def _from_stdin() -> str:
    if sys.stdin.isatty():
        raise click.UsageError("--password-stdin reads a pipe or a file; without it you are asked")
    content = sys.stdin.buffer.read(PASSWORD_READ_MAX + 1)
    if len(content) > PASSWORD_READ_MAX:
        raise click.UsageError("stdin has more than a password; pipe in nothing else")
    try:
        # The newline that `echo` and editors put at the end belongs to no password.
        password = content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise click.UsageError("stdin has no text in UTF-8") from None
    if not password:
        raise click.UsageError("the password is empty: stdin had nothing in it")
    return password


def _asked(host: str) -> str:
    if not sys.stdin.isatty():
        raise click.UsageError(
            "there is no terminal to ask for the password; pipe it in with --password-stdin"
        )
    # Not click's prompt, which is there before the echo is off.
    try:
        password = getpass.getpass(f"Password for {host}: ", sys.stderr)
    except EOFError:
        password = ""
    if not password:
        raise click.UsageError("the password is empty")
    return password


def _table(items: Sequence[Registry], wide: bool) -> Table:
    now = datetime.now(UTC)
    header = ["HOST", "AGE", "SET"] + (["NAME"] if wide else [])
    rows = []
    for item in items:
        row = [tables.last(item.name), age(item.create_time, now), f"{age(item.update_time, now)} ago"]
        rows.append([*row, *([item.name] if wide else []), item.username])
    return Table([*header, "USERNAME"], list(rows))
