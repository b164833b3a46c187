"""One resource or many of them, in the form that was asked for."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any

import click

from dure.client.cli import tables
from dure.client.cli.options import Shell
from dure.client.cli.output import emit, emit_list
from dure.client.cli.tables import Table
from dure.client.cli.text import clean


async def show_list(
    shell: Shell, key: str, items: AsyncIterator[Any], table: Callable[[list[Any], bool], Table], empty: str
) -> None:
    """A table, a document under `key`, or names; `empty` says what to do when there is nothing."""
    found = [item async for item in items]
    if shell.output in ("json", "yaml", "name"):
        emit_list(key, found, shell.output)
    elif shell.quiet:
        for item in found:
            click.echo(tables.last(item.name))
    elif found or shell.output:
        tables.show(table(found, shell.output == "wide"), color=shell.color)
    else:
        click.echo(empty, err=True)


def show_one(
    shell: Shell,
    item: Any,
    table: Callable[[list[Any], bool], Table],
    facts: Iterable[tuple[str, str]] | None = None,
) -> None:
    """A document, a name, a table of one row, or with `facts` a list of what is known of it."""
    if shell.output in ("json", "yaml", "name"):
        emit(item, shell.output)
    elif shell.output:
        tables.show(table([item], shell.output == "wide"), color=shell.color)
    elif facts is not None:
        for key, value in facts:
            if value:
                click.echo(f"{key + ':':<18}{clean(value)}")


def amounts(slots: Mapping[str, str]) -> str:
    """`cpu=4, mem=8 GiB`."""
    return ", ".join(f"{slot}={tables.amount_text(slot, slots[slot])}" for slot in sorted(slots))


def changed(current: Mapping[str, str], asked: Iterable[str], option: str) -> dict[str, str]:
    """Current amounts with `slot=amount` put in and `slot-` taken out. Raises UsageError."""
    result = dict(current)
    for text in asked:
        slot, equals, amount = text.partition("=")
        if equals and slot and amount:
            result[slot] = amount
        elif not equals and text.endswith("-") and len(text) > 1:
            result.pop(text[:-1], None)
        else:
            raise click.UsageError(f"{option} {text}: write SLOT=AMOUNT, or SLOT- to take it out")
    return result
