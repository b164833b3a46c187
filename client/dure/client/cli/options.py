"""Options that every client command takes, and what stands behind them."""

from __future__ import annotations

import asyncio
import functools
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from dure.client.client import Client
from dure.client.context import CONTEXT_NAME, saved_path
from dure.wire.quantities import parse_duration_s

FORMATS = ("table", "wide", "json", "yaml", "name")
# A person should not wait longer to hear that nothing is there; enough for a manager that restarts.
RETRY_S = 2.0


@dataclass(frozen=True)
class Shell:
    """How one command was called. `output` None: the command's own text for people."""

    output: str | None
    quiet: bool
    no_color: bool
    project: str | None
    context: Path | None

    def client(self, project: str | None = None) -> Client:
        return Client.from_context(self.context, project=project or self.project, retry_s=RETRY_S)

    @property
    def color(self) -> bool:
        return sys.stdout.isatty() and not self.no_color and not os.environ.get("NO_COLOR")

    @property
    def live(self) -> bool:
        """Whether progress may move about on stderr."""
        return sys.stderr.isatty() and not self.quiet and os.environ.get("TERM") != "dumb"

    def say(self, text: str) -> None:
        """A line for people; nothing for programs or with -q."""
        if self.output is None and not self.quiet:
            click.echo(text)


class Duration(click.ParamType[float]):
    """Seconds, from `90`, `90s`, `15m`, `1h30m`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return parse_duration_s(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class ContextFile(click.ParamType[Path]):
    """A context by its name (`dure context list`), or by its file."""

    name = "context"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        text = str(value)
        saved = saved_path(text) if CONTEXT_NAME.fullmatch(text) else None
        return saved if saved is not None and saved.exists() else Path(text)


class Pair(click.ParamType[tuple[str, str]]):
    """`KEY=VALUE`."""

    name = "key=value"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        key, equals, content = str(value).partition("=")
        if not key or not equals:
            self.fail(f"`{value}` does not have the form KEY=VALUE", param, ctx)
        return key, content


def pairs(option: str, given: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """A mapping of the pairs. Raises UsageError when a key comes twice."""
    mapping: dict[str, str] = {}
    for key, value in given:
        if key in mapping:
            raise click.UsageError(f"{option} {key}=... was given twice")
        mapping[key] = value
    return mapping


def command(
    group: click.Group,
    name: str,
    *,
    output: bool = False,
    formats: tuple[str, ...] = FORMATS,
    cls: type[click.Command] = click.Command,
    scoped: bool = True,
) -> Callable[[Callable[..., Awaitable[int | None]]], click.Command]:
    """Makes a client command of an async function that takes a Shell and the parameters.

    `scoped` False leaves out --project, for what belongs to no project.
    """

    def decorate(function: Callable[..., Awaitable[int | None]]) -> click.Command:
        @functools.wraps(function)
        def run(**parameters: Any) -> int | None:
            shell = Shell(
                output=parameters.pop("output", None),
                quiet=parameters.pop("quiet"),
                no_color=parameters.pop("no_color"),
                project=parameters.pop("project") if scoped else None,
                context=parameters.pop("context_file"),
            )

            async def body() -> int | None:
                return await function(shell, **parameters)

            return asyncio.run(body())

        wrapped: Callable[..., Any] = run
        if output:
            wrapped = click.option("-o", "--output", type=click.Choice(formats), help="Form of the output.")(
                wrapped
            )
        for option in (
            click.option("-q", "--quiet", is_flag=True, help="Print only what was asked for."),
            click.option("--no-color", is_flag=True, help="No colours."),
            click.option(
                "--project",
                metavar="NAME",
                envvar="DURE_PROJECT",
                help="Another project than the context's; also $DURE_PROJECT.",
            )
            if scoped
            else None,
            click.option(
                "--context",
                "context_file",
                type=ContextFile(),
                help="Another context: its name, or its file.",
            ),
        ):
            wrapped = option(wrapped) if option is not None else wrapped
        return group.command(name, cls=cls)(wrapped)

    return decorate


def waiting(default_s: float = 300.0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds --wait and --timeout (as `wait` and `timeout_s`)."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function = click.option("--wait", is_flag=True, help="Wait until it is done.")(function)
        return timeout(default_s)(function)

    return decorate


def timeout(default_s: float = 300.0) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(
        "--timeout",
        "timeout_s",
        type=Duration(),
        default=default_s,
        show_default=f"{default_s:g}s",
        help="How long to wait at most, such as 90s or 5m.",
    )
