"""`dure token`: what programs call an endpoint with."""

from __future__ import annotations

from datetime import datetime, timedelta

import click

from dure.client.cli import tables
from dure.client.cli.options import Shell, command
from dure.client.cli.output import emit, emit_list
from dure.client.cli.text import moment, parse_expiry
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


@command(token, "show", output=True)
@click.argument("name", metavar="[ENDPOINT] TOKEN", nargs=-1, required=True)
async def show(shell: Shell, name: tuple[str, ...]) -> None:
    """Show a token again, its secret included; -q prints just the secret."""
    endpoint, which = _which(name)
    async with shell.client() as client:
        _show(shell, await client.tokens.get(which, endpoint), created=False)


@command(token, "list", output=True)
@click.argument("endpoint")
async def list_(shell: Shell, endpoint: str) -> None:
    """List the tokens of an endpoint, newest first."""
    async with shell.client() as client:
        items = [item async for item in client.tokens.list(endpoint)]
    if shell.output in ("json", "yaml", "name"):
        emit_list("tokens", items, shell.output)
    elif shell.quiet:
        for item in items:
            click.echo(item.uid)
    elif items or shell.output:
        tables.show(tables.tokens(items, shell.output == "wide"), color=shell.color)
    else:
        click.echo(f"No tokens. `dure token create {endpoint} --expires 1h` issues one.", err=True)


@command(token, "revoke", output=True)
@click.argument("name", metavar="[ENDPOINT] TOKEN", nargs=-1, required=True)
async def revoke(shell: Shell, name: tuple[str, ...]) -> None:
    """Revoke a token: within a second no proxy accepts it."""
    endpoint, which = _which(name)
    async with shell.client() as client:
        item = await client.tokens.revoke(which, endpoint)
    shell.say(f"token {item.uid} revoked")
    if shell.output in ("json", "yaml", "name"):
        emit(item, shell.output)
    elif shell.output:
        tables.show(tables.tokens([item], shell.output == "wide"), color=shell.color)


def _which(name: tuple[str, ...]) -> tuple[str | None, str]:
    if len(name) > 2 or (len(name) == 1 and "/" not in name[0]):
        raise click.UsageError("give ENDPOINT and the token's ID, or its full name (`-o name` prints it)")
    return (name[0], name[1]) if len(name) == 2 else (None, name[0])


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
