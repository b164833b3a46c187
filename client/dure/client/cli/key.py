"""`dure key`: API keys."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import click

from dure.client.cli import tables
from dure.client.cli.answers import show_list
from dure.client.cli.options import Duration, Shell, command
from dure.client.cli.output import emit
from dure.client.cli.tables import Table
from dure.client.cli.text import age, moment
from dure.client.client import Client
from dure.v1.project_pb2 import ROLE_UNSPECIFIED, ApiKey, Role
from dure.wire.errors import NotFound


@click.group()
def key() -> None:
    """API keys: what `dure` and programs call the manager with."""


_user = click.option("--user", default="", metavar="NAME", help="Of another user (administrators).")


@command(key, "create", output=True, scoped=False)
@_user
@click.option("--label", default="", help="What it is for.")
@click.option(
    "--role",
    type=click.Choice(["admin", "member", "viewer"]),
    help="Most that it allows; default all that its user may do.",
)
@click.option("--project", default="", metavar="NAME", help="Only project that it is good for; default all.")
@click.option("--expires", "ttl_s", type=Duration(), help="How long it works, such as 30d; default for ever.")
async def create(
    shell: Shell, user: str, label: str, role: str | None, project: str, ttl_s: float | None
) -> None:
    """Make an API key. Its secret is shown once; -q prints only the secret."""
    cap = ROLE_UNSPECIFIED if role is None else Role.Value(f"ROLE_{role.upper()}")
    async with shell.client() as client:
        item = await client.keys.create(user=user, label=label, role=cap, project=project, ttl_s=ttl_s)
    if shell.output in ("json", "yaml", "name"):
        emit(item, shell.output)
    elif shell.quiet:
        click.echo(item.secret)
    elif shell.output:
        tables.show(_table([item], shell.output == "wide"), color=shell.color)
        click.echo(item.secret)
    else:
        owner = item.name.split("/")[1]
        until = f", until {moment(item.expire_time)}" if item.HasField("expire_time") else ""
        click.echo(
            f"key {tables.last(item.name)} of {owner}, {limits(item)}{until}; not shown again:", err=True
        )
        click.echo(item.secret)
        click.echo(
            f"next: `dure context add {owner} --api-key -` takes it up (paste it), "
            f"`dure context use {owner}` makes it yours",
            err=True,
        )


@command(key, "list", output=True, scoped=False)
@_user
async def list_(shell: Shell, user: str) -> None:
    """List your API keys, without their secrets."""
    async with shell.client() as client:
        await show_list(
            shell, "keys", client.keys.list(user), _table, "No keys. `dure key create` makes one."
        )


@command(key, "delete", scoped=False)
@click.argument("name", metavar="KEY")
@_user
async def delete(shell: Shell, name: str, user: str) -> None:
    """End an API key at once. KEY is its ID, its label if only one has it, or its full name."""
    async with shell.client() as client:
        full = name if "/" in name else await _find(client, name, user)
        await client.keys.delete(full)
    shell.say(f"key {tables.last(full)} deleted")


async def _find(client: Client, asked: str, user: str) -> str:
    keys = [item async for item in client.keys.list(user)]
    found = [item.name for item in keys if tables.last(item.name) == asked]
    found = found or [item.name for item in keys if item.label == asked]
    if len(found) > 1:
        raise click.UsageError(f"{len(found)} keys have the label `{asked}`: name one by its ID")
    if not found:
        whose = f"user `{user}` has" if user else "you have"
        raise NotFound(f"{whose} no key `{asked}`", reason="KEY_NOT_FOUND")
    return found[0]


def limits(item: ApiKey) -> str:
    """`all that its user may do`, `viewer only, in project p only`."""
    parts = []
    if item.role != ROLE_UNSPECIFIED:
        parts.append(f"as {tables.status_word(item, 'role').lower()} only")
    if item.project:
        parts.append(f"in project {item.project} only")
    return ", ".join(parts) or "all that its user may do"


def _table(items: Sequence[ApiKey], wide: bool) -> Table:
    now = datetime.now(UTC)
    header = ["ID", "ALLOWS", "EXPIRES", "AGE"] + (["NAME"] if wide else [])
    rows = []
    for item in items:
        expires = moment(item.expire_time) if item.HasField("expire_time") else "never"
        row = [tables.last(item.name), limits(item), expires, age(item.create_time, now)]
        rows.append([*row, *([item.name] if wide else []), item.label])
    return Table([*header, "LABEL"], list(rows))
