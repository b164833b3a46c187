"""`dure rule`: the scaling rules of an endpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, cast

import click

from dure.client.cli import live, tables
from dure.client.cli.answers import show_list, show_one
from dure.client.cli.options import Duration, Shell, command
from dure.client.cli.tables import Table
from dure.client.cli.text import age, clean, moment
from dure.client.notation import duration_text
from dure.client.rule_notation import (
    CONDITIONS,
    SOURCES,
    RuleFields,
    comparator_of,
    condition_text,
    direction,
    is_enabled,
    least,
    most,
    number_text,
    signed_step,
    type_word,
)
from dure.client.rules import Kept
from dure.scaling.values import SYMBOLS, Comparator
from dure.v1.scaling_pb2 import ScalingRule


@click.group()
def rule() -> None:
    """Scaling rules: when an endpoint gets more replicas, and when fewer.

    Those that scale up are looked at first, then those that scale down, each in the order in which they were
    made; the first that fires wins.
    """


class _Number(click.ParamType[str]):
    """A decimal number, exactly as it was written."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return number_text(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Comparator(click.ParamType[str]):
    """`GREATER_THAN`, `>`, `above`."""

    name = "comparator"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return comparator_of(str(value)).value
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Type(click.ParamType[str]):
    name = "up|down"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return type_word(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


_OPTIONS = (
    click.option("--type", "type_", type=_Type(), metavar="up|down", help="Which way; by the step's sign."),
    click.option("--source", type=click.Choice(list(SOURCES)), help="Who measures."),
    click.option("--metric", metavar="NAME", help="Such as concurrency, latency:p95, cpu_util."),
    click.option("--above", metavar="X", type=_Number(), help="It fires while the metric is above X."),
    click.option("--at-least", metavar="X", type=_Number(), help="... is X or more."),
    click.option("--below", metavar="X", type=_Number(), help="... is below X."),
    click.option("--at-most", metavar="X", type=_Number(), help="... is X or less."),
    click.option(
        "--comparator",
        type=_Comparator(),
        metavar="WORD",
        help="The same in two: LESS_THAN, LESS_THAN_OR_EQUAL, GREATER_THAN, GREATER_THAN_OR_EQUAL ...",
    ),
    click.option("--threshold", metavar="X", type=_Number(), help="... and with what it is compared."),
    click.option(
        "--step",
        type=click.IntRange(-10_000, 10_000),
        help="Replicas to add or to remove; default 1. A negative one means --type down.",
    ),
    click.option(
        "--min",
        "min_replicas",
        type=click.IntRange(0, 10_000),
        help="It never goes below; default 1 to scale up, 0 to scale down. 0 lets the endpoint go IDLE.",
    ),
    click.option(
        "--max", "max_replicas", type=click.IntRange(0, 10_000), help="It never goes above; default 10."
    ),
    click.option("--cooldown", type=Duration(), help="How long it rests after it fired; default 300s."),
    click.option(
        "--window", type=Duration(), help="Time over which the metric is averaged; default: newest value."
    ),
    click.option(
        "--clamp/--no-clamp",
        "clamp",
        default=None,
        help="Whether a step beyond a bound goes to the bound, instead of not at all.",
    ),
    click.option("--enabled/--disabled", "enabled", default=None, help="Whether it is looked at."),
)


def _settings(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


@command(rule, "add", output=True)
@click.argument("endpoint")
@click.option("--name", metavar="NAME", default="", help="Default rule-1, rule-2 ...")
@_settings
async def add(shell: Shell, endpoint: str, name: str, **given: Any) -> None:
    """Make a rule.

    \b
    dure rule add chat --source proxy --metric concurrency --above 8 --step 2 --cooldown 30s
    dure rule add chat --source proxy --metric concurrency --below 2 --step -1 --window 60s
    """
    fields = _fields(given)
    missing = [option for option in ("source", "metric") if option not in fields]
    if missing:
        raise click.UsageError(f"a rule needs --{' and --'.join(missing)}")
    if not any(word in fields for word in CONDITIONS) and "comparator" not in fields:
        raise click.UsageError("a rule needs a condition: --above X, --at-least X, --below X or --at-most X")
    async with shell.client() as client:
        kept = await client.rules.add(endpoint, name, **fields)
    made = tables.last(kept.rule.name)
    shell.say(f"rule {made} of endpoint {tables.last(endpoint)} made: {condition_text(kept.rule)}")
    _warn(shell, kept)
    shell.say(f"next: `dure rule explain {tables.last(endpoint)}` says what it sees")
    show_one(shell, kept.rule, table)


@command(rule, "list", output=True)
@click.argument("endpoint")
@click.option("-w", "--watch", is_flag=True, help="Go on and show every change.")
async def list_(shell: Shell, endpoint: str, watch: bool) -> None:
    """List the rules of an endpoint in the order in which they were made."""
    async with shell.client() as client:
        if watch:

            async def fetch() -> list[ScalingRule]:
                return [item async for item in client.rules.list(endpoint)]

            await live.poll_table(shell, fetch, lambda items: table(items, shell.output == "wide"))
            return
        empty = (
            f"No rules. `dure rule add {tables.last(endpoint)} --source proxy --metric concurrency "
            "--above 8` makes one."
        )
        await show_list(shell, "rules", client.rules.list(endpoint), table, empty)


@command(rule, "get", output=True)
@click.argument("endpoint")
@click.argument("name")
async def get(shell: Shell, endpoint: str, name: str) -> None:
    """Show a rule."""
    async with shell.client() as client:
        item = await client.rules.get(endpoint, name)
    facts = [
        ("Name", item.name),
        ("Condition", condition_text(item)),
        ("Step", f"{signed_step(item):+d} (scale {direction(item)})"),
        ("Bounds", f"{least(item)} to {most(item)}" + (", clamped" if item.clamp else "")),
        ("Cooldown", duration_text(item.cooldown)),
        ("Window", duration_text(item.window) if item.window.ToNanoseconds() else "the newest value"),
        ("Enabled", "yes" if is_enabled(item) else "no"),
        ("Fired", moment(item.fire_time) or "never"),
        ("Created", moment(item.create_time)),
        ("UID", item.uid),
    ]
    show_one(shell, item, table, facts)


@command(rule, "update", output=True)
@click.argument("endpoint")
@click.argument("name")
@_settings
async def update(shell: Shell, endpoint: str, name: str, **given: Any) -> None:
    """Change what is given of a rule, and nothing else."""
    fields = _fields(given)
    if not fields:
        raise click.UsageError("nothing to change: give at least one option such as --above or --step")
    async with shell.client() as client:
        kept = await client.rules.update(endpoint, name, **fields)
    shell.say(f"rule {tables.last(name)} changed: {condition_text(kept.rule)}")
    _warn(shell, kept)
    show_one(shell, kept.rule, table)


@command(rule, "remove")
@click.argument("endpoint")
@click.argument("names", metavar="NAME...", nargs=-1)
@click.option("--all", "all_", is_flag=True, help="All rules of the endpoint.")
async def remove(shell: Shell, endpoint: str, names: tuple[str, ...], all_: bool) -> None:
    """Remove rules. The endpoint keeps the replicas that it has."""
    if bool(names) == all_:
        raise click.UsageError("name the rules to remove, or give --all")
    async with shell.client() as client:
        if all_:
            names = tuple([item.name async for item in client.rules.list(endpoint)])
        for name in names:
            await client.rules.remove(endpoint, name)
            shell.say(f"rule {tables.last(name)} removed")


def table(items: Sequence[ScalingRule], wide: bool = False) -> Table:
    now = datetime.now(UTC)
    header = ["NAME", "TYPE", "SOURCE", "CONDITION", "STEP", "MIN", "MAX", "COOLDOWN", "WINDOW", "FIRED"]
    if wide:
        header += ["CLAMP", "AGE", "UID"]
    rows = []
    for item in items:
        source, condition = condition_text(item).split(" ", 1)
        row = [
            tables.last(item.name),
            direction(item),
            source,
            condition,
            f"{signed_step(item):+d}",
            str(least(item)),
            str(most(item)),
            duration_text(item.cooldown),
            duration_text(item.window) if item.window.ToNanoseconds() else "",
            age(item.fire_time, now),
        ]
        if wide:
            row += ["yes" if item.clamp else "no", age(item.create_time, now), item.uid]
        rows.append([*row, "" if is_enabled(item) else "switched off"])
    return Table([*header, "NOTE"], list(rows))


def _fields(given: dict[str, Any]) -> RuleFields:
    """Only what was given. Raises UsageError."""
    conditions = [word for word in CONDITIONS if given[word] is not None]
    if len(conditions) > 1:
        options = " and ".join(f"--{word.replace('_', '-')}" for word in conditions)
        raise click.UsageError(f"{options} exclude each other: a rule has one condition; make two rules")
    if conditions and (given["comparator"] or given["threshold"]):
        raise click.UsageError(
            f"--{conditions[0].replace('_', '-')} says what --comparator and --threshold say: leave these out"
        )
    if given["comparator"] and not given["threshold"]:
        symbol = SYMBOLS[Comparator(given["comparator"])]
        raise click.UsageError(f"--comparator {symbol} needs a --threshold")
    fields = {"type" if key == "type_" else key: value for key, value in given.items() if value is not None}
    if fields.get("step") == 0:
        raise click.UsageError("--step 0 changes nothing: give the replicas to add, or with - to remove")
    return cast(RuleFields, fields)


def _warn(shell: Shell, kept: Kept) -> None:
    if not shell.quiet:
        for warning in kept.warnings:
            click.echo(f"warning: {clean(warning)}", err=True)
