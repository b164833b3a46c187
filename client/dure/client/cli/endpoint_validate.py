"""`dure endpoint validate|explain`: whether something would run, and why something does not."""

from __future__ import annotations

import sys
from contextlib import aclosing
from typing import Any

import click

from dure.client.cli import live, tables
from dure.client.cli.endpoint import endpoint
from dure.client.cli.endpoint_fields import fields_of
from dure.client.cli.endpoint_options import TakesCommand, settings
from dure.client.cli.options import Shell, command, timeout
from dure.client.cli.output import dumps, emit, enum_word, to_value
from dure.client.cli.text import clean, cut
from dure.client.endpoints import VALIDATE_S
from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import LogChunk, ValidationOutcome


@command(endpoint, "validate", output=True, formats=("json", "yaml"), cls=TakesCommand)
@click.argument("name", required=False, default="")
@click.option("--model", required=True, metavar="FOLDER", help="Folder of usage `model`.")
@settings
@click.option("--dry-run", is_flag=True, help="Check files, image, slots and placement; start nothing.")
@timeout(VALIDATE_S)
async def validate(shell: Shell, name: str, model: str, dry_run: bool, timeout_s: float, **given: Any) -> int:
    """Try out what an endpoint would be, and remove it again.

    Events and logs are shown as they come. Ends with 0 when a replica became healthy (or the dry run found
    nothing wrong), else with 1. Ctrl-C ends the session, too.
    """
    fields = fields_of(given)
    outcome, said = ValidationOutcome(), ""
    async with shell.client() as client:
        pieces = client.endpoints.validate(name, model=model, dry_run=dry_run, timeout_s=timeout_s, **fields)
        async with aclosing(pieces):
            with live.image_progress(shell) as images:
                async for piece in pieces:
                    kind = piece.WhichOneof("piece")
                    images(piece.kernel if kind == "kernel" else None)
                    if shell.output:
                        form = "line" if shell.output == "json" else "yaml"
                        click.echo(("---\n" if form == "yaml" else "") + dumps(to_value(piece), form))
                    elif kind == "event":
                        said = piece.event.message
                        mark = click.style("!", fg="red") if piece.event.warning else "*"
                        _tell(shell, f"{mark} {piece.event.reason}: {clean(piece.event.message)}")
                    elif kind == "log":
                        _log(shell, piece.log)
                    if kind == "outcome":
                        outcome = piece.outcome
                    sys.stdout.flush()
    if not shell.output:
        if outcome.health != endpoint_pb2.HEALTH_UNKNOWN and outcome.detail not in said:
            _tell(shell, clean(outcome.detail))
        _last_word(shell, outcome)
    return 0 if _passed(outcome, dry_run) else 1


@command(endpoint, "explain", output=True, formats=("table", "json", "yaml"))
@click.argument("name")
@click.option("--scaling", is_flag=True, help="What its scaling rules see and decided, instead.")
async def explain(shell: Shell, name: str, scaling: bool) -> None:
    """Say of each node whether another replica would fit there now, and why not."""
    async with shell.client() as client:
        if scaling:
            # It stands on the commands of rules, which few calls need.
            from dure.client.cli.rule_explain import show_scaling

            await show_scaling(shell, client, name)
            return
        answer = await client.endpoints.explain(name)
    if shell.output in ("json", "yaml"):
        emit(answer, shell.output)
        return
    if not shell.output:
        click.echo(clean(answer.summary))
        if answer.request:
            click.echo(f"a replica needs {clean(answer.request)}")
        click.echo()
    tables.show(tables.explained(answer.nodes), color=shell.color)
    if answer.advice and not shell.output:
        click.echo("\nWhat to do")
        for line in answer.advice:
            click.echo(f"  {clean(line)}")


def _tell(shell: Shell, text: str) -> None:
    if text and not shell.quiet:
        click.echo(text, color=shell.color)


def _log(shell: Shell, chunk: LogChunk) -> None:
    prefix = f"{chunk.kernel or 'main1'} | "
    for line in chunk.lines:
        _tell(shell, click.style(prefix, fg="cyan") + _printable(line.text))
    if chunk.notice:
        _tell(shell, click.style(f"{prefix}({clean(chunk.notice)})", fg="bright_black"))


def _printable(text: str) -> str:
    """The line as it is, but nothing in it that steers the terminal."""
    return cut("".join(c if c.isprintable() or c == "\t" else "?" for c in text), 4096)


def _passed(outcome: ValidationOutcome, dry_run: bool) -> bool:
    if outcome.result != endpoint_pb2.VALIDATION_RESULT_FINISHED:
        return False
    return dry_run or outcome.health == endpoint_pb2.HEALTH_HEALTHY


def _last_word(shell: Shell, outcome: ValidationOutcome) -> None:
    """A line that scripts can look for: `Finished: HEALTHY`, or what was found where nothing ran for long."""
    result = enum_word(endpoint_pb2.ValidationResult.DESCRIPTOR, outcome.result)
    health = enum_word(endpoint_pb2.Health.DESCRIPTOR, outcome.health)
    word = {"FINISHED": "Finished", "FAILED": "Failed", "TIMED_OUT": "Timed out"}.get(result, result)
    found = clean(outcome.detail.partition("; last log lines: ")[0])
    text = f"{word}: {found if health == 'UNKNOWN' and found else health}"
    good = health == "HEALTHY" or (word == "Finished" and health == "UNKNOWN")
    click.echo(click.style(text, fg="green" if good else "red", bold=True), color=shell.color)
