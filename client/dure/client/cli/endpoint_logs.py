"""`dure endpoint logs`, and `dure logs`: what the sessions of an endpoint wrote."""

from __future__ import annotations

import sys
from contextlib import aclosing

import click

from dure.client.cli import tables
from dure.client.cli.endpoint import endpoint
from dure.client.cli.options import Duration, Shell, command
from dure.client.cli.output import dumps
from dure.client.cli.text import clean
from dure.client.client import Client
from dure.v1.endpoint_pb2 import LogChunk, LogLine
from dure.wire.errors import NotFound

TAIL_LINES = 100
_COLORS = ("cyan", "yellow", "green", "magenta", "blue", "bright_cyan", "bright_yellow", "bright_magenta")


@command(endpoint, "logs", output=True, formats=("text", "json"))
@click.argument("name", metavar="NAME[/REPLICA]")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes, also of new replicas.")
@click.option("--since", "max_age_s", type=Duration(), help="Only what is younger, such as 5m.")
@click.option(
    "--tail",
    "tail_lines",
    type=click.IntRange(0, 1_000_000),
    default=None,
    show_default=f"{TAIL_LINES}, and all with --since",
    help="Only so many of the last lines of each kernel; 0 for all that are kept.",
)
@click.option(
    "-p", "--previous", is_flag=True, help="The replica that ended last, instead of those that live."
)
@click.option("-k", "--kernel", default="", metavar="NAME", help="Only this kernel, such as main1.")
@click.option("-t", "--timestamps", is_flag=True, help="With the time at which each line was written.")
async def logs(
    shell: Shell,
    name: str,
    follow: bool,
    max_age_s: float | None,
    tail_lines: int | None,
    previous: bool,
    kernel: str,
    timestamps: bool,
) -> None:
    """Show what the sessions of an endpoint wrote, of one replica with NAME/REPLICA.

    `-o json` prints a document for each line.
    """
    if follow and previous:
        raise click.UsageError("--previous shows what has ended: leave out --follow")
    if tail_lines is None:
        tail_lines = 0 if max_age_s is not None else TAIL_LINES
    async with shell.client() as client:
        endpoint_name, _, wanted = name.partition("/replicas/" if name.startswith("projects/") else "/")
        replica = await _replica(client, endpoint_name, wanted) if wanted else ""
        printer = _Printer(shell, timestamps, many=await _are_many(client, endpoint_name, replica, kernel))
        chunks = client.endpoints.logs(
            endpoint_name,
            replica=replica,
            kernel=kernel,
            follow=follow,
            tail_lines=tail_lines,
            max_age_s=max_age_s,
            previous=previous,
        )
        async with aclosing(chunks):
            async for chunk in chunks:
                printer.show(chunk)


async def _replica(client: Client, name: str, wanted: str) -> str:
    """The uid of a replica, given as it is or as tables show it."""
    async for item in client.endpoints.replicas(name, show_ended=True):
        if wanted in (item.uid, tables.short_uid(item.uid)):
            return str(item.uid)
    raise NotFound(
        f"endpoint {name} has no replica `{wanted}`; `dure endpoint replicas {name} --ended` lists them"
    )


async def _are_many(client: Client, name: str, replica: str, kernel: str) -> bool:
    """Whether lines of several kernels may come, so that each must say whose it is."""
    item = await client.endpoints.get(name)
    kernels = 1 if kernel else max(1, item.cluster_size)
    return kernels > 1 or (not replica and max(item.replica_count, len(item.replicas)) > 1)


class _Printer:
    """Prints lines as they come; each source has a colour of its own."""

    def __init__(self, shell: Shell, timestamps: bool, many: bool) -> None:
        self._shell = shell
        self._timestamps = timestamps
        self._sources: dict[tuple[str, str], str] = {}
        self._many = many

    def show(self, chunk: LogChunk) -> None:
        source = (chunk.replica, chunk.kernel)
        if chunk.replica and source not in self._sources:
            self._sources[source] = _COLORS[len(self._sources) % len(_COLORS)]
        if self._shell.output == "json":
            for line in chunk.lines:
                content = {
                    "replica": chunk.replica,
                    "kernel": chunk.kernel,
                    "time": line.time.ToJsonString(),
                    "text": line.text,
                }
                click.echo(dumps(content, "line"))
        else:
            prefix = self._prefix(source)
            click.echo("".join(f"{prefix}{self._text(line)}\n" for line in chunk.lines), nl=False)
        sys.stdout.flush()
        if chunk.notice and not self._shell.quiet:
            where = f"{tables.short_uid(chunk.replica)}/{chunk.kernel}: " if chunk.replica else ""
            click.echo(f"({where}{clean(chunk.notice)})", err=True)

    def _prefix(self, source: tuple[str, str]) -> str:
        if not (self._many or len(self._sources) > 1) or not source[0]:
            return ""
        text = f"{tables.short_uid(source[0])}/{source[1]} | "
        return click.style(text, fg=self._sources[source]) if self._shell.color else text

    def _text(self, line: LogLine) -> str:
        text = line.text
        if sys.stdout.isatty():
            # Nothing in it may steer the terminal; a file gets it as it is.
            text = "".join(one if one.isprintable() or one == "\t" else "?" for one in text)
        if not self._timestamps:
            return text
        time = line.time.ToJsonString()
        return f"{click.style(time, dim=True) if self._shell.color else time} {text}"
