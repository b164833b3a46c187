"""`dure preset`: named sets of slots."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import click

from dure.client.cli import tables
from dure.client.cli.answers import amounts, changed, show_list, show_one
from dure.client.cli.options import Shell, command
from dure.client.cli.tables import Table
from dure.client.cli.text import age, moment
from dure.v1.catalog_pb2 import Preset


@click.group()
def preset() -> None:
    """Presets: named sets of slots."""


_resource = click.option(
    "-r",
    "--resource",
    "resources",
    multiple=True,
    metavar="SLOT=AMOUNT",
    help="Slots of each replica: cpu=1, mem=8g, cuda.shares=0.5 or cuda.device=1; `SLOT-` takes one out.",
)
_shm = click.option("--shm", metavar="SIZE", help="Size of /dev/shm, such as 1g.")
_group = click.option("--group", metavar="NAME", help="Resource group that it is offered in; default all.")
_description = click.option("--description", help="For people.")


@command(preset, "create", output=True, scoped=False)
@click.argument("name")
@_resource
@_shm
@_group
@_description
async def create(
    shell: Shell,
    name: str,
    resources: tuple[str, ...],
    shm: str | None,
    group: str | None,
    description: str | None,
) -> None:
    """Make a preset."""
    async with shell.client() as client:
        item = await client.presets.create(
            name,
            changed({}, resources, "-r"),
            shared_memory=shm or "",
            resource_group=group or "",
            description=description or "",
        )
    shell.say(f"preset {name} created")
    shell.say(f"next: `dure endpoint create NAME --model FOLDER --preset {name}`")
    show_one(shell, item, _table)


@command(preset, "list", output=True, scoped=False)
async def list_(shell: Shell) -> None:
    """List presets."""
    async with shell.client() as client:
        empty = "No presets. `dure preset create NAME -r cpu=4 -r mem=16g` makes one."
        await show_list(shell, "presets", client.presets.list(), _table, empty)


@command(preset, "get", output=True, scoped=False)
@click.argument("name")
async def get(shell: Shell, name: str) -> None:
    """Show a preset."""
    async with shell.client() as client:
        item = await client.presets.get(name)
    facts = [
        ("Name", item.name),
        ("Description", item.description),
        ("Slots", amounts(item.resource_slots)),
        ("Shared memory", _shared(item)),
        ("Resource group", item.resource_group or "all"),
        ("Created", moment(item.create_time)),
    ]
    show_one(shell, item, _table, facts)


@command(preset, "update", output=True, scoped=False)
@click.argument("name")
@_resource
@_shm
@_group
@_description
async def update(
    shell: Shell,
    name: str,
    resources: tuple[str, ...],
    shm: str | None,
    group: str | None,
    description: str | None,
) -> None:
    """Change a preset; slots that -r does not name stay. What was made from it stays as it is."""
    if not resources and shm is None and group is None and description is None:
        raise click.UsageError("nothing to change: give -r, --shm, --group or --description")
    async with shell.client() as client:
        slots = None
        if resources:
            slots = changed((await client.presets.get(name)).resource_slots, resources, "-r")
        item = await client.presets.update(
            name, resource_slots=slots, shared_memory=shm, resource_group=group, description=description
        )
    shell.say(f"preset {name} changed")
    show_one(shell, item, _table)


@command(preset, "delete", scoped=False)
@click.argument("name")
async def delete(shell: Shell, name: str) -> None:
    """Remove a preset. What was made from it stays as it is."""
    async with shell.client() as client:
        await client.presets.delete(name)
    shell.say(f"preset {name} deleted")


def _table(items: Sequence[Preset], wide: bool) -> Table:
    now = datetime.now(UTC)
    header = ["NAME", "SLOTS", "SHM", "GROUP"] + (["AGE"] if wide else [])
    rows = []
    for item in items:
        row = [
            tables.last(item.name),
            amounts(item.resource_slots),
            _shared(item),
            item.resource_group or "all",
        ]
        rows.append([*row, *([age(item.create_time, now)] if wide else []), item.description])
    return Table([*header, "DESCRIPTION"], list(rows))


def _shared(item: Preset) -> str:
    return tables.amount_text("mem", item.shared_memory) if item.shared_memory else "default"
