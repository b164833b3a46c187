"""`dure token`: what programs call an endpoint with."""

from __future__ import annotations

from datetime import datetime, timedelta

import click

from dure.client.cli import tables
from dure.client.cli.options import Shell, command
from dure.client.cli.output import emit, emit_list
from dure.client.cli.text import moment, parse_expiry
from dure.client.client import Client
from dure.v1 import token_pb2
from dure.v1.token_pb2 import Token


@click.group()
def token() -> None:
    """Tokens to call an endpoint with."""


def _expiry(_: click.Context, __: click.Parameter, text: str) -> timedelta | datetime:
    try:
        return parse_expiry(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@command(token, "create", output=True)
@click.argument("endpoint")
@click.option(
    "--expires",
    required=True,
    callback=_expiry,
    metavar="WHEN",
    help="How long it works (1h, 7d), or until when (2026-12-31T00:00:00Z).",
)
@click.option("--label", default="", help="What it is for.")
async def create(shell: Shell, endpoint: str, expires: timedelta | datetime, label: str) -> None:
    """Issue a token for an endpoint; -q prints just its secret."""
    async with shell.client() as client:
        _show(shell, await client.tokens.create(endpoint, expires, label), created=True)


@command(token, "get", output=True)
@click.argument("name", metavar="[ENDPOINT] TOKEN", nargs=-1, required=True)
async def get(shell: Shell, name: tuple[str, ...]) -> None:
    """Show a token again, its secret included; -q prints just the secret.

    TOKEN is its id, the end of that, or its label; or, without ENDPOINT, its full name.
    """
    async with shell.client() as client:
        _show(shell, await client.tokens.get(await _name(client, name)), created=False)


# `get` is what the other groups say.
token.add_command(get, "show")


@command(token, "list", output=True)
@click.argument("endpoint")
@click.option("--label", help="Only those with this label.")
@click.option("--active", is_flag=True, help="Only those that work.")
async def list_(shell: Shell, endpoint: str, label: str | None, active: bool) -> None:
    """List the tokens of an endpoint, newest first."""
    async with shell.client() as client:
        items = [
            item
            async for item in client.tokens.list(endpoint)
            if (label is None or item.label == label)
            and not (active and item.status != token_pb2.TOKEN_STATUS_ACTIVE)
        ]
    if shell.output in ("json", "yaml", "name"):
        emit_list("tokens", items, shell.output)
    elif shell.quiet:
        for item in items:
            click.echo(item.uid)
    elif items or shell.output:
        tables.show(tables.tokens(items, shell.output == "wide"), color=shell.color)
    else:
        such = " such" if active or label is not None else ""
        click.echo(f"No{such} tokens. `dure token create {endpoint} --expires 1h` issues one.", err=True)


@command(token, "revoke", output=True)
@click.argument("name", metavar="[ENDPOINT] TOKEN", nargs=-1, required=True)
async def revoke(shell: Shell, name: tuple[str, ...]) -> None:
    """Revoke a token: within a second no proxy accepts it.

    TOKEN is its id, the end of that, or its label; or, without ENDPOINT, its full name.
    """
    async with shell.client() as client:
        item = await client.tokens.revoke(await _name(client, name))
    label = f" ({item.label})" if item.label else ""
    shell.say(f"token {item.uid}{label} revoked")
    if shell.output in ("json", "yaml", "name"):
        emit(item, shell.output)
    elif shell.output:
        tables.show(tables.tokens([item], shell.output == "wide"), color=shell.color)


async def _name(client: Client, name: tuple[str, ...]) -> str:
    """The full name of the token that is meant. Raises UsageError, NotFound, InvalidInput."""
    if len(name) > 2 or (len(name) == 1 and "/" not in name[0]):
        raise click.UsageError(
            "give ENDPOINT and the token's id or label, or its full name (`-o name` prints it)"
        )
    if len(name) == 1 or "/" in name[1]:
        return name[-1]
    return (await client.tokens.find(*name)).name


def _show(shell: Shell, item: Token, *, created: bool) -> None:
    if shell.output in ("json", "yaml", "name"):
        emit(item, shell.output)
    elif shell.output:
        tables.show(tables.tokens([item], shell.output == "wide"), color=shell.color)
    elif shell.quiet:
        click.echo(item.secret)
    else:
        click.echo(
            f"token {item.uid}, {tables.status_word(item)}, works until {moment(item.expire_time)}", err=True
        )
        click.echo(item.secret)
        if created:
            click.echo("send it as `Authorization: Bearer TOKEN` (or `BackendAI TOKEN`)", err=True)
