"""`dure endpoint`: making, changing and ending endpoints. Registers its commands on the group."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import click

from dure.client.cli import live, plan, tables
from dure.client.cli.endpoint import endpoint
from dure.client.cli.endpoint_fields import RESETS, anything, fields_of
from dure.client.cli.endpoint_options import TakesCommand, settings
from dure.client.cli.options import Shell, command, timeout, waiting
from dure.client.cli.output import emit
from dure.client.client import Client
from dure.client.manifest import Change, differs
from dure.client.waiting import rollout_summary
from dure.v1.endpoint_pb2 import Endpoint
from dure.wire.errors import Conflict

# Others may change an endpoint between our reading and our writing: then the change is made anew.
TRIES = 4
Result = TypeVar("Result")
_dry_run = click.option("--dry-run", is_flag=True, help="Check everything, show the plan, change nothing.")


@command(endpoint, "create", output=True, cls=TakesCommand)
@click.argument("name")
@click.option("--model", required=True, metavar="FOLDER", help="Folder of usage `model`.")
@settings
@_dry_run
@waiting()
async def create(
    shell: Shell, name: str, model: str, dry_run: bool, wait: bool, timeout_s: float, **given: Any
) -> None:
    """Make an endpoint.

    Settings that are not given come from the preset, the folder's service definition or the runtime.
    """
    fields = fields_of(given)
    async with shell.client() as client:
        item = await client.endpoints.create(name, model=model, dry_run=dry_run, **fields)
        if dry_run:
            show_plan(shell, None, item)
            show(shell, item)
            return
        shell.say(f"endpoint {name} created" + (f" at {item.address}" if item.address else ""))
        await finish(shell, client, item, wait, timeout_s)
    if not wait:
        shell.say(f"next: `dure endpoint wait {name}`, then `dure token create {name} --expires 1h`")


@command(endpoint, "update", output=True, cls=TakesCommand)
@click.argument("name")
@settings
@click.option(
    "--reset",
    type=click.Choice(RESETS),
    multiple=True,
    help="Back to the default. `-e KEY-`, `-r SLOT-` and `--mount FOLDER-` take single ones away.",
)
@click.option("--etag", default="", help="Only if nobody changed it since this etag was read.")
@_dry_run
@waiting()
async def update(
    shell: Shell, name: str, etag: str, dry_run: bool, wait: bool, timeout_s: float, **given: Any
) -> None:
    """Change what is given, and nothing else.

    -e, -r and --mount add to what is there, or replace what has the same key.
    """
    if not anything(given):
        raise click.UsageError("nothing to change: give at least one option such as --replicas or -e")
    async with shell.client() as client:

        async def change() -> tuple[Endpoint, Endpoint]:
            before = await client.endpoints.get(name)
            fields = fields_of(given, before)
            if not fields:
                return before, before
            # What is put over the current values must not undo what somebody else changed meanwhile.
            merged = {
                "environ",
                "resource_slots",
                "extra_mounts",
                "service",
                "rollout_policy",
            } & fields.keys()
            guard = etag or (before.etag if merged else "")
            return before, await client.endpoints.update(name, etag=guard, dry_run=dry_run, **fields)

        before, item = await (change() if etag else again(change))
        show_plan(shell, before, item)
        if dry_run:
            show(shell, item)
            return
        shell.say(f"endpoint {name} {'changed' if differs(before, item) else 'is so already'}")
        await finish(shell, client, item, wait, timeout_s, before)


@command(endpoint, "scale", output=True)
@click.argument("name")
@click.argument("replicas", type=click.IntRange(0, 10_000))
@waiting()
async def scale(shell: Shell, name: str, replicas: int, wait: bool, timeout_s: float) -> None:
    """Set the number of replicas."""
    async with shell.client() as client:
        item = await client.endpoints.update(name, replicas=replicas)
        shell.say(f"endpoint {name} scaled to {replicas}")
        await finish(shell, client, item, wait, timeout_s)


@command(endpoint, "retry", output=True)
@click.argument("name")
@waiting()
async def retry(shell: Shell, name: str, wait: bool, timeout_s: float) -> None:
    """Clear the errors of an endpoint and try again, with its definition file read anew."""
    async with shell.client() as client:
        item = await client.endpoints.retry(name)
        shell.say(f"endpoint {name} tries again")
        await finish(shell, client, item, wait, timeout_s)


@command(endpoint, "wait", output=True)
@click.argument("name")
@timeout()
async def wait_(shell: Shell, name: str, timeout_s: float) -> None:
    """Wait until all replicas of an endpoint are healthy."""
    async with shell.client() as client:
        await finish(shell, client, await client.endpoints.get(name), True, timeout_s)


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
        show(shell, item)


async def again(change: Callable[[], Awaitable[Result]]) -> Result:
    """Reads and writes once more when somebody else was faster."""
    for _ in range(TRIES - 1):
        try:
            return await change()
        except Conflict:
            continue
    return await change()


def show_plan(shell: Shell, before: Endpoint | None, after: Endpoint, rules: Sequence[Change] = ()) -> None:
    """The changed fields and rules, and what that does; for people only."""
    for line in plan.lines(before, after, color=shell.color):
        shell.say(line)
    for change in rules:
        shell.say(plan.line(change, color=shell.color))
    shell.say(f"plan: {plan.effect(before, after, rules)}")


async def finish(
    shell: Shell, client: Client, item: Endpoint, wait: bool, timeout_s: float, before: Endpoint | None = None
) -> None:
    """Waits if asked to, see `wait_for`, and shows the result."""
    show(shell, await wait_for(shell, client, item, timeout_s, before) if wait else item)


async def wait_for(
    shell: Shell, client: Client, item: Endpoint, timeout_s: float, before: Endpoint | None
) -> Endpoint:
    """Waits until it is as wanted: for the rollout, if it has another revision than `before`."""
    rolled_out = before is not None and before.revision != item.revision
    with live.wait_progress(shell) as notify:
        item = await client.endpoints.wait(
            item.name,
            timeout_s=timeout_s,
            notify=notify,
            revision=item.revision if rolled_out else None,
        )
    name, status = tables.last(item.name), tables.status_word(item)
    shell.say(f"endpoint {name} is {status}" + (f" at {item.address}" if item.address else ""))
    if item.HasField("rollout") and item.rollout.waits:
        shell.say(f"{rollout_summary(item.rollout)}: `dure endpoint rollout promote {name}`")
    elif rolled_out and item.desired_replicas:
        shell.say(f"revision {item.revision} is rolled out")
    return item


def show(shell: Shell, item: Endpoint) -> None:
    """In the form that -o asks for; nothing without it."""
    if shell.output in ("json", "yaml", "name"):
        emit(item, shell.output)
    elif shell.output:
        tables.show(tables.endpoints([item], shell.output == "wide"), color=shell.color)
