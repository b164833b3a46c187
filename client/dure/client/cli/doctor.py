"""`dure doctor`: is the cluster of the current context in order?"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from pathlib import Path

import click

from dure.client.checkup import CheckUp, check_up
from dure.client.cli.options import ContextFile, Duration
from dure.client.cli.output import dumps
from dure.client.cli.text import cells, clean

PAUSE_S = 0.3
TIMED_OUT = 6


@click.command()
@click.option("--wait", "wait_s", type=Duration(), help="Try until all is well, for so long (30, 2m).")
@click.option("-o", "--output", type=click.Choice(["table", "json", "yaml"]), help="Form of the output.")
@click.option("--no-color", is_flag=True, help="No colours.")
@click.option(
    "--context",
    "context_file",
    type=ContextFile(),
    help="Another context: its name, or its file.",
)
def doctor(wait_s: float | None, output: str | None, no_color: bool, context_file: Path | None) -> int:
    """Check the cluster of the current context; exit code 0 if all is well."""
    result = asyncio.run(_check(context_file, wait_s))
    if output in ("json", "yaml"):
        click.echo(dumps({"ok": result.ok, "checks": [dataclasses.asdict(c) for c in result.checks]}, output))
    else:
        _show(result, color=sys.stdout.isatty() and not no_color and not os.environ.get("NO_COLOR"))
    if result.ok:
        return 0
    return TIMED_OUT if wait_s is not None else result.exit_code


async def _check(context_file: Path | None, wait_s: float | None) -> CheckUp:
    clock = asyncio.get_running_loop().time
    end = clock() + (wait_s or 0)
    while True:
        result = await check_up(context_file)
        if result.ok or clock() + PAUSE_S >= end:
            return result
        await asyncio.sleep(PAUSE_S)


def _show(result: CheckUp, *, color: bool) -> None:
    width = max(cells(check.name) for check in result.checks)
    for check in result.checks:
        word = click.style("ok    ", fg="green") if check.ok else click.style("FAILED", fg="red")
        click.echo(f"{word}  {check.name:<{width}}  {clean(check.detail)}", color=color)
        if check.remedy:
            click.echo(f"{'':8}{'':{width}}  next: {check.remedy}", color=color)
