"""`dure apply`: endpoints as files."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dure.client.apply import Applied, apply_manifest
from dure.client.cli.endpoint_change import again, show, show_plan, wait_for
from dure.client.cli.options import Shell, command, waiting
from dure.client.cli.output import emit_list
from dure.client.cli.text import clean
from dure.client.client import Client
from dure.client.manifest import differs
from dure.client.manifest_reader import FILE_BYTES_MAX, Manifest, read_manifests
from dure.definitions.problems import Problem, decode, invalid
from dure.wire.errors import InvalidInput, Violation

_commands = click.Group()


@command(_commands, "apply", output=True)
@click.option(
    "-f",
    "--file",
    "files",
    required=True,
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path, allow_dash=True, dir_okay=False),
    help="YAML or JSON, with one or several endpoints; `-` is stdin.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, show the plan, change nothing.")
@waiting()
async def apply(shell: Shell, files: tuple[Path, ...], dry_run: bool, wait: bool, timeout_s: float) -> None:
    """Make endpoints as files say, or change them to it.

    Applying the same file again changes nothing. `dure endpoint get NAME -o manifest` writes one.
    """
    manifests = _read(files)
    _check_projects(manifests, shell.project)
    clients = {manifest.project: shell.client(manifest.project) for manifest in manifests}
    try:
        done = [
            (clients[manifest.project], await _apply(shell, clients[manifest.project], manifest, dry_run))
            for manifest in manifests
        ]
        items = [applied.after for _, applied in done]
        if wait and not dry_run:
            items = [
                await wait_for(shell, client, applied.after, timeout_s, applied.before)
                for client, applied in done
            ]
    finally:
        for client in clients.values():
            await client.close()
    if len(items) > 1 and shell.output in ("json", "yaml"):
        emit_list("endpoints", items, shell.output)
    else:
        for item in items:
            show(shell, item)


async def _apply(shell: Shell, client: Client, manifest: Manifest, dry_run: bool) -> Applied:
    applied = await again(lambda: apply_manifest(client, manifest, dry_run=dry_run))
    shell.say(f"endpoint {manifest.name}:")
    show_plan(shell, applied.before, applied.after, applied.rules.changes)
    if dry_run:
        return applied
    if applied.before is None:
        shell.say(f"endpoint {manifest.name} created at {applied.after.address or 'no address yet'}")
    else:
        changed = differs(applied.before, applied.after) or bool(applied.rules.steps)
        shell.say(f"endpoint {manifest.name} {'changed' if changed else 'is as the file says'}")
    for warning in applied.warnings:
        click.echo(f"warning: {clean(warning)}", err=True)
    return applied


def _read(files: tuple[Path, ...]) -> list[Manifest]:
    """Everything that is wrong with all of the files comes in one error."""
    manifests: list[Manifest] = []
    violations: list[Violation] = []
    for path in files:
        name = "stdin" if str(path) == "-" else str(path)
        content = sys.stdin.buffer.read(FILE_BYTES_MAX + 1) if name == "stdin" else _content(path)
        text = decode(content, name, FILE_BYTES_MAX)
        try:
            if isinstance(text, Problem):
                raise invalid([text])
            manifests += read_manifests(text, name)
        except InvalidInput as error:
            violations += error.violations
    if violations:
        raise InvalidInput.of(violations)
    return manifests


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(FILE_BYTES_MAX + 1)


def _check_projects(manifests: list[Manifest], project: str | None) -> None:
    other = [m for m in manifests if project and m.project not in (None, project)]
    if other:
        raise click.UsageError(
            f"{other[0].name} says project `{other[0].project}`, --project `{project}`: leave one of them out"
        )
