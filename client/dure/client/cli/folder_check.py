"""`dure folder check`: definition files of a folder, or of a directory here. Registers itself."""

from __future__ import annotations

import os
from pathlib import Path

import click

from dure.client.cli.folder import folder
from dure.client.cli.options import Shell, command
from dure.client.cli.output import emit
from dure.client.cli.text import clean
from dure.client.local_check import check_directory
from dure.v1.folder_pb2 import CheckFolderResponse, FileProblem


@command(folder, "check", output=True, formats=("table", "json", "yaml"))
@click.argument("target", metavar="NAME|DIR")
@click.option("--local", is_flag=True, help="DIR is a directory here, even if it looks like a name.")
@click.option(
    "--definition", default="", metavar="PATH", help="Definition file; default model-definition.yaml."
)
async def check(shell: Shell, target: str, local: bool, definition: str) -> int:
    """Check the definition files of a folder, and print everything that is wrong with them.

    DIR is a directory here if it contains a `/` or is `.`; that needs no manager.
    """
    if local or _is_directory(target):
        found = check_directory(Path(target), definition)
    else:
        async with shell.client() as client:
            found = await client.folders.check(target, model_definition_path=definition)
    if shell.output in ("json", "yaml"):
        emit(found, shell.output)
    else:
        _tell(shell, target, found)
    return 1 if found.problems else 0


def _is_directory(target: str) -> bool:
    """A folder's full name (`projects/p/folders/f`) has slashes, too."""
    parts = target.split("/")
    full_name = len(parts) == 4 and parts[0] == "projects" and parts[2] == "folders"
    return target in (".", "..") or ((os.sep in target or "/" in target) and not full_name)


def _tell(shell: Shell, target: str, found: CheckFolderResponse) -> None:
    for problem in found.problems:
        place = click.style(_place(problem), bold=True) if shell.color else _place(problem)
        click.echo(f"{place}: {clean(problem.message)}", color=shell.color)
    count = len(found.problems)
    files = ", ".join(found.files)
    if count:
        shell.say(f"{count} problem{'' if count == 1 else 's'} in {target}")
    else:
        shell.say(f"{target} is right: {files}")


def _place(problem: FileProblem) -> str:
    where = f"{problem.file}:{problem.line}" if problem.line else problem.file
    return clean(f"{where}: {problem.key}" if problem.key else where)
