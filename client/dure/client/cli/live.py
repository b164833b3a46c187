"""What is shown while we wait or watch: in place on a terminal, a line per change elsewhere."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import click

from dure.client.cli import pulling, tables
from dure.client.cli.options import Shell
from dure.client.cli.output import dumps, to_value
from dure.client.cli.text import clean
from dure.client.pulls import kernels_of
from dure.client.waiting import summary
from dure.v1.endpoint_pb2 import Endpoint, Kernel, Replica, WatchEndpointsResponse
from dure.v1.scaling_pb2 import EndpointMeasurements

POLL_S = 2.0
# Narrow columns jump less while rows come one by one.
_ENDPOINT_WIDTHS = (16, 11, 5, 3, 6, 24, 4)
_REPLICA_WIDTHS = (12, 3, 12, 6, 11, 16, 4)
EVENT_WIDTHS = (4, 7, 20, 12)


@contextmanager
def wait_progress(shell: Shell) -> Iterator[Callable[[Endpoint], None]]:
    """Gives a function to call with every state of the endpoint that is waited for."""
    if shell.quiet:
        yield lambda endpoint: None
    elif shell.live:
        with screen(stderr=True, transient=True) as draw:
            yield lambda endpoint: draw(_with_images(endpoint, color=not shell.no_color))
    else:
        clock = asyncio.get_running_loop().time
        began = clock()
        said = ""
        images = pulling.Ticker()

        def tell(endpoint: Endpoint) -> None:
            nonlocal said
            text = f"{tables.last(endpoint.name)}: {clean(summary(endpoint))}"
            if text != said:
                click.echo(f"[{clock() - began:5.1f}s] {text}", err=True)
                said = text
            for line in images.due(kernels_of(endpoint.replicas), clock()):
                click.echo(f"[{clock() - began:5.1f}s] {line}", err=True)

        yield tell


@contextmanager
def image_progress(shell: Shell) -> Iterator[Callable[[Kernel | None], None]]:
    """Gives a function to call with every kernel of which an image moved on, and with None before anything
    else is printed."""
    kernels: dict[str, Kernel] = {}
    images, clock = pulling.Ticker(), asyncio.get_running_loop().time
    with ExitStack() as stack:
        draw: Callable[[list[str]], None] | None = None

        def moved(kernel: Kernel | None) -> None:
            nonlocal draw
            if kernel is None:
                stack.close()
                draw = None
                return
            kernels[kernel.uid] = kernel
            if shell.output or shell.quiet:
                return
            if not shell.live:
                for line in images.due(kernels.values(), clock()):
                    click.echo(line, err=True)
                return
            draw = draw or stack.enter_context(screen(stderr=True, transient=True))
            draw(pulling.lines(kernels.values(), room=pulling.rows(0), color=not shell.no_color))

        yield moved


async def watch_endpoints(
    shell: Shell, batches: AsyncIterator[WatchEndpointsResponse], *, one: bool, only_replicas: bool = False
) -> None:
    """Shows a watch until it ends: a table in place, rows as they come, or a JSON document per line.

    Returns when `one` endpoint is gone.
    """
    form = shell.output or "table"
    in_place = form in ("table", "wide") and sys.stdout.isatty() and not shell.quiet
    current: dict[str, Endpoint] = {}
    if in_place:
        with screen(stderr=False, transient=False) as draw:
            async for batch in batches:
                _apply(current, batch)
                draw(_screen_lines(shell, current, one=one, only_replicas=only_replicas))
                if one and batch.synced and not current:
                    return
        return
    printer = RowPrinter(shell)
    async for batch in batches:
        _apply(current, batch)
        for endpoint in batch.endpoints:
            if only_replicas:
                printer.show(
                    endpoint.replicas, tables.replicas(endpoint.replicas, form == "wide"), _REPLICA_WIDTHS
                )
            else:
                printer.show([endpoint], tables.endpoints([endpoint], form == "wide"), _ENDPOINT_WIDTHS)
        for name in batch.removed:
            printer.removed(name)
        if one and batch.synced and not current:
            return


async def follow(
    shell: Shell,
    items: AsyncIterator[Any],
    table: Callable[[Sequence[Any]], tables.Table],
    widths: Sequence[int],
) -> None:
    """Prints things one by one as they come: rows, or a document for each."""
    printer = RowPrinter(shell)
    async for item in items:
        printer.show([item], table([item]), widths)


async def poll_table(shell: Shell, fetch: Callable[[], Any], table: Callable[[Any], tables.Table]) -> None:
    """Asks again every two seconds: for what has no watch. Ends only by an error or Ctrl-C."""
    form = shell.output or "table"
    if form in ("table", "wide") and sys.stdout.isatty():
        with screen(stderr=False, transient=False) as draw:
            while True:
                draw(table(await fetch()).lines(color=shell.color))
                await asyncio.sleep(POLL_S)
    printer = RowPrinter(shell)
    while True:
        for item in await fetch():
            printer.show([item], table([item]), ())
        await asyncio.sleep(POLL_S)


class RowPrinter:
    """Prints what is new or changed, and the header once."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._form = shell.output or "table"
        self._header_shown = False
        self._seen: dict[str, bytes] = {}

    def show(self, items: Sequence[Any], table: tables.Table, widths: Sequence[int]) -> None:
        for index, item in enumerate(items):
            kept = type(item)()
            kept.CopyFrom(item)
            if "last_heard" in item.DESCRIPTOR.fields_by_name:  # it always changes, and says nothing new
                kept.ClearField("last_heard")
            if self._form not in ("json", "yaml"):
                _forget_progress(kept)
            state = kept.SerializeToString(deterministic=True)
            if self._seen.get(item.name) == state:
                continue
            self._seen[item.name] = state
            if self._form == "json":
                click.echo(dumps(to_value(item), "line"))
            elif self._form == "yaml":
                click.echo("---\n" + dumps(to_value(item), "yaml"))
            elif self._form == "name":
                click.echo(item.name)
            else:
                row = tables.Table(table.header, [table.rows[index]], table.status)
                lines = row.lines(color=self._shell.color, widths=widths)
                for line in lines if not self._header_shown else lines[1:]:
                    click.echo(line)
                self._header_shown = True
        sys.stdout.flush()

    def removed(self, name: str) -> None:
        self._seen.pop(name, None)
        if self._form == "json":
            click.echo(dumps({"name": name, "removed": True}, "line"))
        elif self._form == "yaml":
            click.echo("---\n" + dumps({"name": name, "removed": True}, "yaml"))
        else:
            click.echo(f"{tables.last(name)} is gone", err=True)
        sys.stdout.flush()


def endpoint_lines(
    endpoint: Endpoint,
    *,
    color: bool,
    wide: bool = False,
    seen: Mapping[str, EndpointMeasurements] | None = None,
) -> list[str]:
    """An endpoint and a line for each replica."""
    lines = tables.endpoints([endpoint], wide, seen=seen).lines(color=color)
    if endpoint.replicas:
        lines += ["", *tables.replicas(endpoint.replicas, wide).lines(color=color)]
    return lines


def _with_images(endpoint: Endpoint, *, color: bool, wide: bool = False) -> list[str]:
    """The same, and below it the images that are being fetched for it."""
    lines = endpoint_lines(endpoint, color=color, wide=wide)
    kernels = kernels_of(endpoint.replicas)
    images = pulling.lines(kernels, room=pulling.rows(len(lines) + 1), color=color)
    return [*lines, "", *images] if images else lines


def _forget_progress(item: Any) -> None:
    """A row is not another one because an image has moved on."""
    replicas = item.replicas if isinstance(item, Endpoint) else [item] if isinstance(item, Replica) else []
    for kernel in kernels_of(replicas):
        kernel.ClearField("pull")


def _screen_lines(shell: Shell, current: dict[str, Endpoint], *, one: bool, only_replicas: bool) -> list[str]:
    wide = shell.output == "wide"
    shown = [current[name] for name in sorted(current)]
    if only_replicas:
        return tables.replicas([r for e in shown for r in e.replicas], wide).lines(color=shell.color)
    if one:
        return [line for e in shown for line in _with_images(e, color=shell.color, wide=wide)] or ["gone"]
    return tables.endpoints(shown, wide).lines(color=shell.color)


def _apply(current: dict[str, Endpoint], batch: WatchEndpointsResponse) -> None:
    for endpoint in batch.endpoints:
        current[endpoint.name] = endpoint
    for name in batch.removed:
        current.pop(name, None)


@contextmanager
def screen(*, stderr: bool, transient: bool) -> Iterator[Callable[[list[str]], None]]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=stderr, highlight=False)
    with Live(console=console, transient=transient, auto_refresh=False, vertical_overflow="crop") as live:

        def draw(lines: list[str]) -> None:
            text = Text.from_ansi("\n".join(lines), no_wrap=True, overflow="ellipsis")
            live.update(text, refresh=True)

        yield draw
