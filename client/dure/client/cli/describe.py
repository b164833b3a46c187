"""One resource in full, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import click

from dure.client.cli import tables
from dure.client.cli.text import clean, moment
from dure.v1.agent_pb2 import Agent
from dure.v1.endpoint_pb2 import Endpoint, Event
from dure.wire.quantities import human_bytes

EVENTS_SHOWN = 10


def endpoint(item: Endpoint, events: Sequence[Event], *, color: bool) -> None:
    """Everything about an endpoint: what was asked for, how it is, its replicas, what happened lately."""
    status = tables.status_word(item)
    _facts(
        [
            ("Name", item.name),
            ("Status", tables.paint(status) if color else status),
            ("Reason", item.status_reason),
            ("Address", item.address or "none yet: no proxy has joined"),
            ("Open to public", "yes" if item.open_to_public else "no: requests need a token"),
            ("Replicas", _count(item)),
            ("Revision", str(item.revision)),
            (
                "Model",
                item.model + (f" at {item.model_mount_destination}" if item.model_mount_destination else ""),
            ),
            ("Definition", item.model_definition_path),
            ("Runtime", item.runtime),
            ("Resource group", item.resource_group),
            (
                "Slots",
                ", ".join(_slot(slot, item.resource_slots[slot]) for slot in sorted(item.resource_slots)),
            ),
            ("Environment", ", ".join(f"{key}={item.environ[key]}" for key in sorted(item.environ))),
            ("Created", moment(item.create_time)),
            ("Changed", moment(item.update_time)),
            ("UID", item.uid),
        ],
        color=color,
    )
    _section("Conditions", [f"{c.type}: {clean(c.message)}" for c in item.conditions])
    _section("Errors in a row", [clean(error) for error in item.errors])
    if item.replicas:
        click.echo("\nReplicas")
        tables.show(tables.replicas(item.replicas), color=color)
    if events:
        click.echo("\nNewest events" if len(events) >= EVENTS_SHOWN else "\nEvents")
        tables.show(tables.events(events), color=color)


def agent(item: Agent, *, color: bool) -> None:
    """A node, its slots and its devices."""
    status = tables.status_word(item)
    _facts(
        [
            ("Name", item.name),
            ("Status", tables.paint(status) if color else status),
            ("Reason", item.status_reason),
            ("Resource group", item.resource_group),
            ("Address", item.advertise_address),
            ("Version", item.version),
            ("Back end", item.backend),
            ("Sessions", str(item.session_count)),
            ("UID", item.uid),
        ],
        color=color,
    )
    _section("Limitations", [clean(text) for text in item.limitations])
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
                d.id,
                "SIMULATED" if d.accelerator == "simulated" else d.accelerator,
                d.used_shares or "0",
                human_bytes(d.memory_bytes),
                "yes" if d.healthy else f"no: {d.detail}",
                d.model,
            ]
            for d in item.devices
        ]
        header = ["ID", "ACCELERATOR", "SHARES USED", "MEMORY", "HEALTHY", "MODEL"]
        tables.show(tables.Table(header, list(devices)), color=color)


def _count(item: Endpoint) -> str:
    text = f"{item.ready_replicas} of {item.desired_replicas} ready"
    if item.desired_replicas != item.replica_count:
        text += f" ({item.replica_count} asked for)"
    return text


def _slot(slot: str, amount: str) -> str:
    return f"{slot}={tables.amount_text(slot, amount) if amount.isdigit() else amount}"


def _facts(facts: Iterable[tuple[str, str]], *, color: bool) -> None:
    for key, value in facts:
        if value:
            # A painted status is ours, everything else may hold what a server or a model wrote.
            text = value if value.startswith("\x1b") else clean(value)
            click.echo(f"{key + ':':<16}{text}", color=color)


def _section(title: str, lines: Sequence[str]) -> None:
    if lines:
        click.echo(f"\n{title}")
        for line in lines:
            click.echo(f"  {line}")
