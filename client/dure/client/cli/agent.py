"""`dure agent list|get`: the nodes, as the manager sees them."""

from __future__ import annotations

import click

from dure.client.cli import describe, live, tables
from dure.client.cli.options import Shell, command
from dure.client.cli.output import emit, emit_list
from dure.v1.agent_pb2 import Agent


@click.group()
def agent() -> None:
    """The nodes that run sessions."""


@command(agent, "list", output=True)
@click.option("-w", "--watch", is_flag=True, help="Go on and show every change.")
async def list_(shell: Shell, watch: bool) -> None:
    """List agents."""
    wide = shell.output == "wide"
    async with shell.client() as client:

        async def fetch() -> list[Agent]:
            return [item async for item in client.agents.list()]

        if watch:
            await live.poll_table(shell, fetch, lambda items: tables.agents(items, wide))
        items = await fetch()
    if shell.output in ("json", "yaml", "name"):
        emit_list("agents", items, shell.output)
    elif shell.quiet:
        for item in items:
            click.echo(tables.last(item.name))
    elif items or shell.output:
        tables.show(tables.agents(items, wide), color=shell.color)
    else:
        click.echo("No agents. `dure join-token create agent` lets one join.", err=True)


@command(agent, "get", output=True)
@click.argument("name")
async def get(shell: Shell, name: str) -> None:
    """Show one agent, its slots and devices."""
    async with shell.client() as client:
        item = await client.agents.get(name)
    if shell.output in ("json", "yaml", "name"):
        emit(item, shell.output)
    elif shell.output:
        tables.show(tables.agents([item], shell.output == "wide"), color=shell.color)
    else:
        describe.agent(item, color=shell.color)
