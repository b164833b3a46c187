"""`dure endpoint`: making, changing and ending endpoints. Registers its commands on the group."""

from __future__ import annotations

import click

from dure.client.cli import live, tables
from dure.client.cli.endpoint import endpoint
from dure.client.cli.options import Pair, Shell, command, pairs, timeout, waiting
from dure.client.cli.output import emit
from dure.client.client import Client
from dure.v1.endpoint_pb2 import Endpoint


@command(endpoint, "create", output=True)
@click.argument("name")
@click.option("--model", required=True, metavar="FOLDER", help="Folder of usage `model`.")
@click.option("--runtime", default="custom", show_default=True, help="How the model is served.")
@click.option("--replicas", type=click.IntRange(0, 10_000), default=1, show_default=True, help="How many.")
@click.option(
    "-r",
    "--resource",
    "resources",
    type=Pair(),
    multiple=True,
    help="Slots of each replica: cpu=1, mem=512m, cuda.shares=0.25 (of one GPU) or cuda.device=1.",
)
@click.option("-e", "--env", "environ", type=Pair(), multiple=True, help="Environment variables.")
@click.option("--public/--no-public", default=False, help="Whether requests need no token.")
@click.option("--model-mount", default="", metavar="PATH", help="Where the folder appears; default /models.")
@click.option(
    "--definition", default="", metavar="PATH", help="Definition file; default model-definition.yaml."
)
@click.option(
    "--resource-group", default="", metavar="NAME", help="Where to place replicas; default `default`."
)
@waiting()
async def create(
    shell: Shell,
    name: str,
    model: str,
    runtime: str,
    replicas: int,
    resources: tuple[tuple[str, str], ...],
    environ: tuple[tuple[str, str], ...],
    public: bool,
    model_mount: str,
    definition: str,
    resource_group: str,
    wait: bool,
    timeout_s: float,
) -> None:
    """Make an endpoint."""
    async with shell.client() as client:
        item = await client.endpoints.create(
            name,
            model=model,
            runtime=runtime,
            replicas=replicas,
            resource_slots=pairs("-r", resources),
            environ=pairs("-e", environ),
            open_to_public=public,
            resource_group=resource_group,
            model_mount_destination=model_mount,
            model_definition_path=definition,
        )
        shell.say(f"endpoint {name} created" + (f" at {item.address}" if item.address else ""))
        await _finish(shell, client, item, wait, timeout_s)
    if not wait:
        shell.say(f"next: `dure endpoint wait {name}`, then `dure token create {name} --expires 1h`")


@command(endpoint, "update", output=True)
@click.argument("name")
@click.option("--replicas", type=click.IntRange(0, 10_000), help="How many.")
@click.option("--public/--no-public", default=None, help="Whether requests need no token.")
@click.option("--etag", default="", help="Only if nobody changed it since this etag was read.")
@waiting()
async def update(
    shell: Shell,
    name: str,
    replicas: int | None,
    public: bool | None,
    etag: str,
    wait: bool,
    timeout_s: float,
) -> None:
    """Change an endpoint."""
    if replicas is None and public is None:
        raise click.UsageError("nothing to change: give --replicas, --public or --no-public")
    async with shell.client() as client:
        item = await client.endpoints.update(name, replicas=replicas, open_to_public=public, etag=etag)
        shell.say(f"endpoint {name} changed")
        await _finish(shell, client, item, wait, timeout_s)


@command(endpoint, "scale", output=True)
@click.argument("name")
@click.argument("replicas", type=click.IntRange(0, 10_000))
@waiting()
async def scale(shell: Shell, name: str, replicas: int, wait: bool, timeout_s: float) -> None:
    """Set the number of replicas."""
    async with shell.client() as client:
        item = await client.endpoints.update(name, replicas=replicas)
        shell.say(f"endpoint {name} scaled to {replicas}")
        await _finish(shell, client, item, wait, timeout_s)


@command(endpoint, "retry", output=True)
@click.argument("name")
@waiting()
async def retry(shell: Shell, name: str, wait: bool, timeout_s: float) -> None:
    """Clear the errors of an endpoint and try again, with its definition file read anew."""
    async with shell.client() as client:
        item = await client.endpoints.retry(name)
        shell.say(f"endpoint {name} tries again")
        await _finish(shell, client, item, wait, timeout_s)


@command(endpoint, "wait", output=True)
@click.argument("name")
@timeout()
async def wait_(shell: Shell, name: str, timeout_s: float) -> None:
    """Wait until all replicas of an endpoint are healthy."""
    async with shell.client() as client:
        await _finish(shell, client, await client.endpoints.get(name), True, timeout_s)


@command(endpoint, "delete", output=True)
@click.argument("name")
@waiting()
async def delete(shell: Shell, name: str, wait: bool, timeout_s: float) -> None:
    """Drain, stop and remove an endpoint."""
    async with shell.client() as client:
        item = await client.endpoints.delete(name)
        if wait:
            with live.wait_progress(shell) as notify:
                await client.endpoints.wait_gone(name, timeout_s=timeout_s, notify=notify)
        shell.say(f"endpoint {name} {'deleted' if wait else 'is being deleted'}")
        _emit(shell, item)


async def _finish(shell: Shell, client: Client, item: Endpoint, wait: bool, timeout_s: float) -> None:
    if wait:
        with live.wait_progress(shell) as notify:
            item = await client.endpoints.wait(item.name, timeout_s=timeout_s, notify=notify)
        status = tables.status_word(item)
        shell.say(
            f"endpoint {tables.last(item.name)} is {status}" + (f" at {item.address}" if item.address else "")
        )
    _emit(shell, item)


def _emit(shell: Shell, item: Endpoint) -> None:
    if shell.output in ("json", "yaml", "name"):
        emit(item, shell.output)
    elif shell.output:
        tables.show(tables.endpoints([item], shell.output == "wide"), color=shell.color)
