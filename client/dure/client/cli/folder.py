"""`dure folder`: folders, and the files in them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from dure.client.cli import tables
from dure.client.cli.options import Shell, command
from dure.client.cli.output import emit, emit_list
from dure.client.transfer import Progress
from dure.client.tree import files_of
from dure.v1.folder_pb2 import FolderUsage
from dure.wire.errors import NotFound
from dure.wire.quantities import human_bytes


@click.group()
def folder() -> None:
    """Folders with models and data."""


@command(folder, "create", output=True)
@click.argument("name")
@click.option(
    "--usage",
    type=click.Choice(["model", "data", "general"]),
    default="general",
    show_default=True,
    help="What it is for; endpoints serve folders of usage `model`.",
)
async def create(shell: Shell, name: str, usage: str) -> None:
    """Make an empty folder."""
    async with shell.client() as client:
        item = await client.folders.create(name, FolderUsage.Value(f"FOLDER_USAGE_{usage.upper()}"))
    shell.say(f"folder {name} created; next: `dure folder upload {name} DIR`")
    if shell.output in ("json", "yaml", "name"):
        emit(item, shell.output)
    elif shell.output:
        tables.show(tables.folders([item], shell.output == "wide"), color=shell.color)


@command(folder, "list", output=True)
async def list_(shell: Shell) -> None:
    """List the folders of the project."""
    async with shell.client() as client:
        items = [item async for item in client.folders.list()]
    if shell.output in ("json", "yaml", "name"):
        emit_list("folders", items, shell.output)
    elif shell.quiet:
        for item in items:
            click.echo(tables.last(item.name))
    elif items or shell.output:
        tables.show(tables.folders(items, shell.output == "wide"), color=shell.color)
    else:
        click.echo("No folders. `dure folder create NAME --usage model` makes one.", err=True)


@command(folder, "ls", output=True)
@click.argument("name")
@click.argument("path", default="")
async def ls(shell: Shell, name: str, path: str) -> None:
    """List files: of a folder, or below PATH in it."""
    async with shell.client() as client:
        items = await client.folders.select(name, path)
    if shell.output in ("json", "yaml", "name"):
        emit_list("files", items, shell.output)
    elif shell.quiet:
        for item in items:
            click.echo(item.path)
    elif items or shell.output:
        tables.show(tables.files(items), color=shell.color)
    else:
        click.echo(f"Folder {name} is empty. `dure folder upload {name} DIR` fills it.", err=True)


@command(folder, "upload", output=True)
@click.argument("name")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--to", default="", metavar="PATH", help="Path in the folder; default its root.")
@click.option("--follow-symlinks", is_flag=True, help="Also links that lead out of the directory.")
async def upload(shell: Shell, name: str, source: Path, to: str, follow_symlinks: bool) -> None:
    """Upload a file, or the content of a directory (hidden files too, `.git` not)."""
    files = files_of(source, to, follow_symlinks=follow_symlinks)
    total = sum(file.size_bytes for file in files)
    async with shell.client() as client:
        with _bar(shell, "uploading", total) as progress:
            stored = await client.folders.upload(name, files, progress=progress)
    shell.say(f"{_files(len(stored))}, {human_bytes(total)}, uploaded to folder {tables.last(name)}")
    if shell.output:
        if shell.output in ("json", "yaml", "name"):
            emit_list("files", stored, shell.output)
        else:
            tables.show(tables.files(stored), color=shell.color)


@command(folder, "download")
@click.argument("name")
@click.argument("places", nargs=-1, required=True, metavar="[PATH] DEST")
async def download(shell: Shell, name: str, places: Sequence[str]) -> None:
    """Download a folder, a sub-folder's content, or a file, to DEST."""
    if len(places) > 2:
        raise click.UsageError("give at most a PATH in the folder and a DEST")
    path, target = ("", places[0]) if len(places) == 1 else (places[0], places[1])
    async with shell.client() as client:
        total = sum(file.size_bytes for file in await client.folders.select(name, path))
        with _bar(shell, "downloading", total) as progress:
            written = await client.folders.download(name, Path(target), path=path, progress=progress)
    shell.say(f"{_files(len(written))}, {human_bytes(total)}, downloaded to {target}")


@command(folder, "rm")
@click.argument("name")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("-r", "--recursive", is_flag=True, help="Sub-folders with all in them.")
@click.option("-f", "--force", is_flag=True, help="It is no error if there is no such file.")
async def rm(shell: Shell, name: str, paths: Sequence[str], recursive: bool, force: bool) -> None:
    """Remove files from a folder."""
    async with shell.client() as client:
        for path in paths:
            try:
                await client.folders.rm(name, path.rstrip("/"), recursive=recursive)
            except NotFound:
                if not force:
                    raise
    shell.say(f"removed {', '.join(paths)} from folder {name}")


@command(folder, "delete")
@click.argument("name")
async def delete(shell: Shell, name: str) -> None:
    """Delete a folder and all its files; refused while an endpoint uses it."""
    async with shell.client() as client:
        await client.folders.delete(name)
    shell.say(f"folder {name} deleted")


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"


@contextmanager
def _bar(shell: Shell, what: str, total_bytes: int) -> Iterator[Progress | None]:
    if not shell.live or not sys.stderr.isatty():
        yield None
        return
    with progress_bar(what, total_bytes) as progress:
        yield progress


@contextmanager
def progress_bar(what: str, total_bytes: int) -> Iterator[Progress]:
    """A bar on stderr for the bytes of a transfer."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=max(total_bytes, 1))
        yield lambda path, moved_bytes: bar.advance(task, moved_bytes)
