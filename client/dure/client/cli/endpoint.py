"""`dure endpoint`: what there is, and how it is."""

from __future__ import annotations

from contextlib import aclosing

import click

from dure.client.cli import live, tables
from dure.client.cli.measured import measured
from dure.client.cli.options import FORMATS, Duration, Shell, command
from dure.client.cli.output import dumps, emit, emit_list
from dure.client.manifest import to_manifest
from dure.v1.endpoint_pb2 import Event


@click.group()
def endpoint() -> None:
    """Model services at a permanent address."""


_watch = click.option("-w", "--watch", is_flag=True, help="Go on and show every change.")


@command(endpoint, "list", output=True)
@_watch
async def list_(shell: Shell, watch: bool) -> None:
    """List the endpoints of the project."""
    async with shell.client() as client:
        if watch:
            async with aclosing(client.endpoints.watch()) as batches:
                await live.watch_endpoints(shell, batches, one=False)
            return
        items = [item async for item in client.endpoints.list()]
        seen = await measured(client) if items and shell.output == "wide" else None
    if shell.output in ("json", "yaml", "name"):
        emit_list("endpoints", items, shell.output)
    elif shell.quiet:
        for item in items:
            click.echo(tables.last(item.name))
    elif items or shell.output:
        tables.show(tables.endpoints(items, shell.output == "wide", seen=seen), color=shell.color)
    else:
        click.echo(
            "No endpoints. `dure endpoint create NAME --model FOLDER -r cpu=1 -r mem=1g` makes one.", err=True
        )


@command(endpoint, "get", output=True, formats=(*FORMATS, "manifest"))
@click.argument("name")
@_watch
async def get(shell: Shell, name: str, watch: bool) -> None:
    """Show one endpoint, with its replicas and newest events.

    `-o manifest` prints what was asked for as a file for `dure apply`.
    """
    if watch and shell.output == "manifest":
        raise click.UsageError("-o manifest prints one document: leave out --watch")
    async with shell.client() as client:
        item = await client.endpoints.get(name)
        if shell.output == "manifest":
            rules = [rule async for rule in client.rules.list(name)]
            click.echo(dumps(to_manifest(item, rules), "yaml"))
            return
        if watch:
            async with aclosing(client.endpoints.watch(name)) as batches:
                await live.watch_endpoints(shell, batches, one=True)
            return
        if shell.output in ("json", "yaml", "name"):
            emit(item, shell.output)
        elif shell.output:
            wide = shell.output == "wide"
            seen = await measured(client) if wide else None
            for line in live.endpoint_lines(item, color=shell.color, wide=wide, seen=seen):
                click.echo(line)
        else:
            # It stands on the commands of rollouts, which stand on this group.
            from dure.client.cli import describe_endpoint

            events: list[Event] = []
            async with aclosing(client.endpoints.events(name)) as newest:
                async for event in newest:
                    events.append(event)
                    if len(events) == describe_endpoint.EVENTS_SHOWN:
                        break
            seen = await measured(client)
            describe_endpoint.endpoint(item, events, color=shell.color, seen=seen.get(item.name))


@command(endpoint, "replicas", output=True)
@click.argument("name")
@click.option("--ended", "--all", "show_ended", is_flag=True, help="Those that have ended, too.")
@_watch
async def replicas(shell: Shell, name: str, show_ended: bool, watch: bool) -> None:
    """List the replicas of an endpoint."""
    if watch and show_ended:
        raise click.UsageError("--watch shows living replicas only: leave out --ended")
    async with shell.client() as client:
        if watch:
            await client.endpoints.get(name)
            async with aclosing(client.endpoints.watch(name)) as batches:
                await live.watch_endpoints(shell, batches, one=True, only_replicas=True)
            return
        items = [item async for item in client.endpoints.replicas(name, show_ended=show_ended)]
    if shell.output in ("json", "yaml", "name"):
        emit_list("replicas", items, shell.output)
    elif items or shell.output:
        tables.show(tables.replicas(items, shell.output == "wide"), color=shell.color)
    else:
        click.echo(
            f"No replicas; --ended lists those that have ended, `dure endpoint get {name}` says why.",
            err=True,
        )


@command(endpoint, "events", output=True)
@click.argument("name")
@click.option("--since", "max_age_s", type=Duration(), help="Only younger ones, such as 15m.")
@click.option("-f", "--follow", is_flag=True, help="Oldest first, and go on with what happens.")
async def events(shell: Shell, name: str, max_age_s: float | None, follow: bool) -> None:
    """List what happened to an endpoint, newest first."""
    async with shell.client() as client:
        if follow:
            async with aclosing(client.endpoints.follow_events(name, max_age_s=max_age_s)) as news:
                await live.follow(shell, news, tables.events, live.EVENT_WIDTHS)
            return
        items = [item async for item in client.endpoints.events(name, max_age_s=max_age_s)]
    if shell.output in ("json", "yaml", "name"):
        emit_list("events", items, shell.output)
    else:
        tables.show(tables.events(items), color=shell.color)
