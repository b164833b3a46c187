"""`dure model`: the model store."""

from __future__ import annotations

from collections.abc import Sequence

import click

from dure.client.cli import tables
from dure.client.cli.endpoint_change import finish
from dure.client.cli.options import Shell, command, waiting
from dure.client.cli.output import dumps, to_value
from dure.client.cli.text import clean
from dure.v1.folder_pb2 import FileProblem
from dure.v1.model_pb2 import Model


@click.group()
def model() -> None:
    """Model folders, and what their definition files say of them."""


@command(model, "list", output=True)
async def list_(shell: Shell) -> None:
    """List the models of the project."""
    async with shell.client() as client:
        items = [item async for item in client.models.list()]
    if shell.output in ("json", "yaml"):
        click.echo(dumps({"models": [to_value(item) for item in items]}, shell.output))
    elif shell.output == "name" or shell.quiet:
        for item in items:
            click.echo(item.folder if shell.output else tables.last(item.folder))
    elif items or shell.output:
        tables.show(_table(items, shell.output == "wide"), color=shell.color)
    else:
        click.echo("No models. `dure folder create NAME --usage model` makes a folder for one.", err=True)


@command(model, "get", output=True)
@click.argument("name")
async def get(shell: Shell, name: str) -> None:
    """Show what a model says of itself, and whether it can be run as it is."""
    async with shell.client() as client:
        item = await client.models.get(name)
    if shell.output in ("json", "yaml"):
        click.echo(dumps(to_value(item), shell.output))
    elif shell.output == "name":
        click.echo(item.folder)
    elif shell.output:
        tables.show(_table([item], shell.output == "wide"), color=shell.color)
    else:
        _describe(item)


@command(model, "run", output=True)
@click.argument("name")
@click.option(
    "--name", "endpoint_id", default="", metavar="NAME", help="Of the endpoint; default the model's."
)
@click.option("--runtime", default="", metavar="NAME", help="Default: the first of the service definition.")
@click.option("--replicas", type=click.IntRange(1, 10_000), default=1, show_default=True, help="How many.")
@waiting()
async def run(
    shell: Shell, name: str, endpoint_id: str, runtime: str, replicas: int, wait: bool, timeout_s: float
) -> None:
    """Start the service of a model from its service definition."""
    async with shell.client() as client:
        item = await client.models.run(name, endpoint_id=endpoint_id, runtime=runtime, replicas=replicas)
        made = tables.last(item.name)
        shell.say(f"endpoint {made} created" + (f" at {item.address}" if item.address else ""))
        await finish(shell, client, item, wait, timeout_s)
    if not wait:
        shell.say(f"next: `dure endpoint wait {made}`, then `dure token create {made} --expires 1h`")


def _table(items: Sequence[Model], wide: bool) -> tables.Table:
    header = ["NAME", "TITLE", "TASK", "RUNTIMES", "RUNNABLE"]
    if wide:
        header += ["VERSION", "AUTHOR", "LICENSE", "FRAMEWORK"]
    rows = []
    for item in items:
        about = item.metadata
        row = [
            tables.last(item.folder),
            about.title or item.model_name,
            about.task,
            ", ".join(item.runtimes),
            "yes" if item.runnable else "no",
        ]
        if wide:
            row += [about.version, about.author, about.license, ", ".join(about.framework)]
        rows.append([*row, _why_not(item.problems)])
    return tables.Table([*header, "REASON"], list(rows))


def _why_not(problems: Sequence[FileProblem]) -> str:
    if not problems:
        return ""
    first = problems[0]
    place = f"{first.file}:{first.line}" if first.line else first.file
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{place}: {first.message}{more}"


def _describe(item: Model) -> None:
    about = item.metadata
    facts = [("Folder", item.folder), ("Name", item.model_name)]
    facts += [
        (field.name.replace("_", " ").capitalize(), getattr(about, field.name))
        for field in about.DESCRIPTOR.fields
        if not field.is_repeated
    ]
    facts += [
        ("Framework", ", ".join(about.framework)),
        ("Label", ", ".join(about.label)),
        (
            "Min resource",
            ", ".join(f"{slot}={amount}" for slot, amount in sorted(about.min_resource.items())),
        ),
        ("Runtimes", ", ".join(item.runtimes)),
        ("Runnable", f"yes: dure model run {tables.last(item.folder)}" if item.runnable else "no"),
    ]
    width = max(len(label) for label, value in facts if value)
    for label, value in facts:
        if value:
            click.echo(f"{label + ':':<{width + 2}}{clean(value)}")
    if item.problems:
        click.echo("\nProblems")
    for problem in item.problems:
        click.echo(f"  {_why_not([problem])}")
