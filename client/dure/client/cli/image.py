"""`dure image`: container images."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import click

from dure.client.cli import tables
from dure.client.cli.answers import amounts, changed, show_list, show_one
from dure.client.cli.options import Shell, command
from dure.client.cli.tables import Table
from dure.client.cli.text import age, moment
from dure.v1.catalog_pb2 import Image


@click.group()
def image() -> None:
    """Container images that endpoints may name."""


_architecture = click.option(
    "--architecture", type=click.Choice(["x86_64", "aarch64"]), help="CPU that it is built for."
)
_runtime = click.option(
    "--runtime", "runtimes", multiple=True, metavar="NAME", help="Runtimes that it is made for; default all."
)
_least = click.option(
    "--min",
    "min_slots",
    multiple=True,
    metavar="SLOT=AMOUNT",
    help="Least slots that it needs, such as mem=8g; `SLOT-` takes one out.",
)
_description = click.option("--description", help="For people.")


@command(image, "create", output=True, scoped=False)
@click.argument("name")
@click.argument("reference")
@_architecture
@_runtime
@_least
@_description
async def create(
    shell: Shell,
    name: str,
    reference: str,
    architecture: str | None,
    runtimes: tuple[str, ...],
    min_slots: tuple[str, ...],
    description: str | None,
) -> None:
    """Make an image known. REFERENCE is its full path, such as example.com/model-server:latest."""
    async with shell.client() as client:
        item = await client.images.create(
            name,
            reference,
            architecture or "x86_64",
            runtimes=runtimes,
            min_slots=changed({}, min_slots, "--min"),
            description=description or "",
        )
    shell.say(f"image {name} created for {item.architecture}")
    shell.say(f"next: `dure endpoint create NAME --model FOLDER --image {name}`")
    show_one(shell, item, _table)


@command(image, "list", output=True, scoped=False)
async def list_(shell: Shell) -> None:
    """List images."""
    async with shell.client() as client:
        empty = "No images. `dure image create NAME REFERENCE` makes one known."
        await show_list(shell, "images", client.images.list(), _table, empty)


@command(image, "get", output=True, scoped=False)
@click.argument("name")
async def get(shell: Shell, name: str) -> None:
    """Show an image."""
    async with shell.client() as client:
        item = await client.images.get(name)
    facts = [
        ("Name", item.name),
        ("Description", item.description),
        ("Reference", item.reference),
        ("Architecture", item.architecture),
        ("Runtimes", ", ".join(item.runtimes) or "all"),
        ("Least slots", amounts(item.min_slots)),
        ("Created", moment(item.create_time)),
    ]
    show_one(shell, item, _table, facts)


@command(image, "update", output=True, scoped=False)
@click.argument("name")
@click.option("--reference", metavar="PATH", help="Its full path.")
@_architecture
@_runtime
@click.option("--all-runtimes", is_flag=True, help="It is for all runtimes.")
@_least
@_description
async def update(
    shell: Shell,
    name: str,
    reference: str | None,
    architecture: str | None,
    runtimes: tuple[str, ...],
    all_runtimes: bool,
    min_slots: tuple[str, ...],
    description: str | None,
) -> None:
    """Change an image; --runtime replaces the list. What was made from it stays as it is."""
    if runtimes and all_runtimes:
        raise click.UsageError("give --runtime or --all-runtimes, not both")
    given = (reference, architecture, description)
    if all(value is None for value in given) and not (runtimes or all_runtimes or min_slots):
        raise click.UsageError(
            "nothing to change: give --reference, --architecture, --runtime, --all-runtimes, --min or "
            "--description"
        )
    async with shell.client() as client:
        least = None
        if min_slots:
            least = changed((await client.images.get(name)).min_slots, min_slots, "--min")
        item = await client.images.update(
            name,
            reference=reference,
            architecture=architecture,
            runtimes=runtimes if runtimes or all_runtimes else None,
            min_slots=least,
            description=description,
        )
    shell.say(f"image {name} changed")
    show_one(shell, item, _table)


@command(image, "delete", scoped=False)
@click.argument("name")
async def delete(shell: Shell, name: str) -> None:
    """Forget an image. What was made from it stays as it is."""
    async with shell.client() as client:
        await client.images.delete(name)
    shell.say(f"image {name} deleted")


def _table(items: Sequence[Image], wide: bool) -> Table:
    now = datetime.now(UTC)
    header = ["NAME", "REFERENCE", "ARCHITECTURE", "RUNTIMES"] + (["LEAST", "AGE"] if wide else [])
    rows = []
    for item in items:
        row = [tables.last(item.name), item.reference, item.architecture, ", ".join(item.runtimes) or "all"]
        row += [amounts(item.min_slots), age(item.create_time, now)] if wide else []
        rows.append([*row, item.description])
    return Table([*header, "DESCRIPTION"], list(rows))
