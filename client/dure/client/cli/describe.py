"""One agent in full, for people; and how such pages are laid out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click

from dure.client.cli import tables
from dure.client.cli.text import clean
from dure.v1.agent_pb2 import Agent
from dure.wire.quantities import human_bytes


def agent(item: Agent, *, color: bool) -> None:
    """A node, its slots and its devices."""
    status = tables.agent_word(item)
    facts(
        [
            ("Name", item.name),
            ("Status", tables.paint(status) if color else status),
            (
                "Draining",
                "yes: it gets no new sessions; `dure agent resume` takes it back" if item.draining else "",
            ),
            ("Reason", item.status_reason),
            ("Resource group", item.resource_group),
            ("Address", item.advertise_address),
            ("Version", item.version),
            ("Back end", item.backend),
            ("Architecture", item.architecture),
            ("Sessions", str(item.session_count)),
            ("UID", item.uid),
        ],
        color=color,
    )
    section("Limitations", [clean(text) for text in item.limitations])
    if item.slots:
        click.echo("\nSlots")
        rows = [
            [s.slot, tables.amount_text(s.slot, s.used or "0"), tables.amount_text(s.slot, s.capacity)]
            for s in item.slots
        ]
        tables.show(tables.Table(["SLOT", "USED", "CAPACITY"], list(rows)), color=color)
    if item.devices:
        click.echo("\nDevices")
        devices = [
            [
                f"{d.id} (part of {d.parent})" if d.parent else d.id,
                "SIMULATED" if d.accelerator == "simulated" else d.accelerator,
                f"{d.used_shares or '0'}/{d.shares}" if d.shares else d.used_shares or "0",
                d.enforcement,
                str(d.numa_node) if d.HasField("numa_node") else "",
                human_bytes(d.memory_bytes),
                "yes" if d.healthy else f"no: {d.detail}",
                d.model,
            ]
            for d in item.devices
        ]
        header = ["ID", "ACCELERATOR", "SHARES USED", "ENFORCES", "NUMA", "MEMORY", "HEALTHY", "MODEL"]
        tables.show(tables.Table(header, list(devices)), color=color)


def facts(pairs: Iterable[tuple[str, str]], *, color: bool, indent: int = 0) -> None:
    """A line for each that has a value."""
    for key, value in pairs:
        if value:
            # A painted status is ours, everything else may hold what a server or a model wrote.
            text = value if key == "Status" else clean(value)
            click.echo(f"{' ' * indent}{key + ':':<16}{text}", color=color)


def section(title: str, lines: Sequence[str]) -> None:
    """Nothing without lines."""
    if lines:
        click.echo(f"\n{title}")
        for line in lines:
            click.echo(f"  {line}")
