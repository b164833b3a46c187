"""`dure endpoint history|rollback|rollout`: revisions, and how one takes the place of another."""

from __future__ import annotations

import itertools

import click

from dure.client.cli import plan, tables
from dure.client.cli.describe_endpoint import rollout_lines
from dure.client.cli.endpoint import endpoint
from dure.client.cli.endpoint_change import finish, show
from dure.client.cli.options import Shell, command, waiting
from dure.client.cli.output import emit, emit_list
from dure.client.manifest import changes
from dure.v1.endpoint_pb2 import Endpoint, Revision
from dure.wire.errors import NotFound


@command(endpoint, "history", output=True)
@click.argument("name")
@click.option("--revision", "number", type=click.IntRange(min=1), help="Only this one, in full.")
@click.option("--diff", is_flag=True, help="The fields that each one changed.")
async def history(shell: Shell, name: str, number: int | None, diff: bool) -> None:
    """List the revisions of an endpoint, newest first."""
    async with shell.client() as client:
        items = [item async for item in client.endpoints.history(name)]
    # A page may end between a revision and the one that it is compared with: so compare them here.
    before: dict[int, Endpoint | None] = {
        item.number: older.spec for item, older in itertools.pairwise(items)
    }
    if number is not None:
        items = [item for item in items if item.number == number]
        if not items:
            raise NotFound(f"endpoint `{tables.last(name)}` has no revision {number}")
    if shell.output in ("json", "yaml", "name"):
        if number is not None:
            emit(items[0], shell.output)
        else:
            emit_list("revisions", items, shell.output)
    elif diff:
        for item in items:
            _heading(shell, item)
            for line in _differences(shell, before.get(item.number), item):
                click.echo(f"  {line}")
    elif number is not None and not shell.output:
        _heading(shell, items[0])
        for line in _differences(shell, None, items[0]):
            click.echo(f"  {line}")
        if items[0].model_definition:
            click.echo(f"\nDefinition file\n{items[0].model_definition.rstrip()}")
    else:
        tables.show(tables.revisions(items, shell.output == "wide"), color=shell.color)


@command(endpoint, "rollback", output=True)
@click.argument("name")
@click.option("--to", "number", type=click.IntRange(min=1), help="Revision; default: the last healthy one.")
@waiting()
async def rollback(shell: Shell, name: str, number: int | None, wait: bool, timeout_s: float) -> None:
    """Roll out an earlier revision again."""
    async with shell.client() as client:
        before = await client.endpoints.get(name)
        item = await client.endpoints.rollback(name, number or 0)
        # How it is rolled out is not for the policy to say: the way back has no steps.
        for line in plan.lines(before, item, color=shell.color):
            shell.say(line)
        shell.say(f"endpoint {name} goes back from revision {before.revision} to {item.revision}")
        await finish(shell, client, item, wait, timeout_s, before)


@endpoint.group("rollout")
def rollout() -> None:
    """The rollout that goes on: look at it, hold it, go on with it."""


@command(rollout, "status", output=True)
@click.argument("name")
async def status(shell: Shell, name: str) -> None:
    """Show where a rollout stands."""
    async with shell.client() as client:
        item = await client.endpoints.get(name)
    if shell.output:
        show(shell, item)
    elif not item.HasField("rollout"):
        shell.say(f"no rollout goes on; endpoint {name} is at revision {item.revision}")
    else:
        for line in rollout_lines(item):
            click.echo(line)
        tables.show(tables.replicas(item.replicas), color=shell.color)


@command(rollout, "pause", output=True)
@click.argument("name")
async def pause(shell: Shell, name: str) -> None:
    """Hold a rollout where it is: no replica is replaced until it is resumed."""
    async with shell.client() as client:
        _told(shell, await client.endpoints.pause_rollout(name))


@command(rollout, "resume", output=True)
@click.argument("name")
@waiting()
async def resume(shell: Shell, name: str, wait: bool, timeout_s: float) -> None:
    """Go on with a paused rollout, or take the step that waits."""
    await _go_on(shell, name, full=False, wait=wait, timeout_s=timeout_s)


@command(rollout, "promote", output=True)
@click.argument("name")
@waiting()
async def promote(shell: Shell, name: str, wait: bool, timeout_s: float) -> None:
    """Skip all steps that are left: all requests go to the new revision."""
    await _go_on(shell, name, full=True, wait=wait, timeout_s=timeout_s)


async def _go_on(shell: Shell, name: str, *, full: bool, wait: bool, timeout_s: float) -> None:
    async with shell.client() as client:
        item = await client.endpoints.resume_rollout(name, full=full)
        if not wait:
            _told(shell, item)
            return
        # Compared with a revision that none has, any is a new one: the wait is for the rollout.
        await finish(shell, client, item, True, timeout_s, Endpoint())


def _told(shell: Shell, item: Endpoint) -> None:
    if item.HasField("rollout"):
        for line in rollout_lines(item):
            shell.say(line)
    else:
        shell.say(f"no rollout goes on; endpoint {tables.last(item.name)} is at revision {item.revision}")
    show(shell, item)


def _heading(shell: Shell, item: Revision) -> None:
    state = tables.status_word(item, "state")
    text = f"revision {item.number} {tables.paint(state) if shell.color else state}"
    for part in (item.author and f"by {item.author}", item.change, item.reason):
        text += f", {part}" if part else ""
    click.echo(text)


def _differences(shell: Shell, before: Endpoint | None, item: Revision) -> list[str]:
    # A revision holds only what shapes a replica.
    shaping = [change for change in changes(before, item.spec) if change.path != "replicas"]
    return [plan.line(change, color=shell.color) for change in shaping]
