"""`dure join-token`: letting agents and proxies join."""

from __future__ import annotations

import click

from dure.client.cli.options import Duration, Shell, command
from dure.client.cli.output import dumps, to_value
from dure.client.cli.text import moment
from dure.client.context import load_context
from dure.v1.admin_pb2 import JoinRole


@click.group("join-token")
def join_token() -> None:
    """Let agents and proxies join the cluster."""


@command(join_token, "create", output=True)
@click.argument("role", type=click.Choice(["agent", "proxy"]))
@click.option("--ttl", "ttl_s", type=Duration(), help="How long it lets in; default 1h. Who joined stays.")
async def create(shell: Shell, role: str, ttl_s: float | None) -> None:
    """Issue a join token; -q prints just the token."""
    async with shell.client() as client:
        response = await client.admin.create_join_token(JoinRole.Value(f"JOIN_ROLE_{role.upper()}"), ttl_s)
    if shell.output in ("json", "yaml"):
        click.echo(dumps(to_value(response), shell.output))
    elif shell.quiet or shell.output:
        click.echo(response.token)
    else:
        manager = load_context(shell.context).manager
        click.echo(f"works until {moment(response.expire_time)}; on the node:", err=True)
        click.echo(f"DURE_JOIN_TOKEN={response.token} dure {role} --manager {manager}")
