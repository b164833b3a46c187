"""`dure agent list|get|drain|resume`: the nodes, as the manager sees them."""

from __future__ import annotations

import click

from dure.client.cli import describe, live, tables
from dure.client.cli.options import Shell, command, timeout
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
@click.option("-w", "--watch", is_flag=True, help="Go on and show every change.")
async def get(shell: Shell, name: str, watch: bool) -> None:
    """Show one agent, its slots and devices."""
    async with shell.client() as client:
        if watch:

            async def fetch() -> list[Agent]:
                return [await client.agents.get(name)]

            await live.poll_table(shell, fetch, lambda items: tables.agents(items, shell.output == "wide"))
        item = await client.agents.get(name)
    _show(shell, item, whole=True)


@command(agent, "drain", output=True)
@click.argument("name")
@click.option("--wait", is_flag=True, help="Wait until no session is left on it.")
@timeout()
async def drain(shell: Shell, name: str, wait: bool, timeout_s: float) -> None:
    """Give an agent no new sessions, and move those that it has to others."""
    async with shell.client() as client:
        item = await client.agents.drain(name)
        shell.say(f"agent {tables.last(item.name)} is draining: {_sessions(item)} to move")
        if wait:
            item = await client.agents.wait_empty(name, timeout_s=timeout_s)
            shell.say(f"agent {tables.last(item.name)} has no sessions any more")
    if not wait:
        shell.say(f"next: `dure agent get {name} -w` shows it, `dure agent resume {name}` takes it back")
    _show(shell, item)


@command(agent, "resume", output=True)
@click.argument("name")
async def resume(shell: Shell, name: str) -> None:
    """Take an agent back into use."""
    async with shell.client() as client:
        item = await client.agents.resume(name)
    shell.say(f"agent {tables.last(item.name)} takes sessions again")
    _show(shell, item)


def _sessions(item: Agent) -> str:
    return f"{item.session_count} session{'' if item.session_count == 1 else 's'}"


def _show(shell: Shell, item: Agent, *, whole: bool = False) -> None:
    if shell.output in ("json", "yaml", "name"):
        emit(item, shell.output)
    elif shell.output:
        tables.show(tables.agents([item], shell.output == "wide"), color=shell.color)
    elif whole:
        describe.agent(item, color=shell.color)
