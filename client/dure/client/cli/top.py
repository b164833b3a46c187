"""`dure top`: what endpoints and nodes do now."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Mapping, Sequence

import click

from dure.client.cli import live, tables
from dure.client.cli.options import Shell, command
from dure.client.cli.output import dumps, to_value
from dure.client.cli.tables import Table
from dure.client.cli.text import clean, figure, milliseconds
from dure.client.client import Client
from dure.v1.agent_pb2 import Agent
from dure.v1.endpoint_pb2 import Endpoint
from dure.v1.scaling_pb2 import EndpointMeasurements, GetMeasurementsResponse, NodeMeasurements
from dure.wire.errors import ManagerUnreachable, PermissionDenied
from dure.wire.quantities import human_bytes

POLL_S = 1.0
# Rows of a page that is not a terminal.
ROWS_MAX = 1_000
NODE_ROWS_MIN = 4

_commands = click.Group()
View = tuple[list[Endpoint], list[Agent], GetMeasurementsResponse]


@command(_commands, "top", output=True, formats=("table", "json", "yaml"))
@click.option("-w", "--watch", is_flag=True, help="Again every second; the default on a terminal.")
@click.option("--once", is_flag=True, help="Once.")
async def top(shell: Shell, watch: bool, once: bool) -> None:
    """Show what endpoints and nodes do now, those with the most requests first.

    Requests are those of the last moment: RPS answered a second, CONC under way, QUEUE waiting for a replica,
    ERR% answered with 500 or above. CPU and MEM of nodes are what sessions use of what the node has.
    """
    if watch and once:
        raise click.UsageError("--watch and --once exclude each other")
    form = shell.output or "table"
    async with shell.client() as client:
        if once or not (watch or (form == "table" and sys.stdout.isatty())):
            _print(shell, await _look(client), form)
            return
        if form != "table" or not sys.stdout.isatty():
            while True:
                _print(shell, await _look(client), "line" if form == "json" else form)
                sys.stdout.flush()
                await asyncio.sleep(POLL_S)
        with live.screen(stderr=False, transient=False) as draw:
            page: list[str] = []
            while True:
                size = shutil.get_terminal_size()
                try:
                    view = await _look(client)
                    page = lines(view, color=shell.color, rows_max=size.lines - 1, width=size.columns)
                    draw(page)
                except ManagerUnreachable as error:
                    if not page:
                        raise
                    # What was last seen stays, with a word on why it does not change.
                    draw([clean(error.message), *page[1:]])
                await asyncio.sleep(POLL_S)


async def _look(client: Client) -> View:
    measurements = await client.measurements()
    items = [item async for item in client.endpoints.list()]
    try:
        agents = [agent async for agent in client.agents.list()]
    except PermissionDenied:
        agents = []
    return items, agents, measurements


def _print(shell: Shell, view: View, form: str) -> None:
    if form == "table":
        for line in lines(view, color=shell.color, rows_max=ROWS_MAX)[1:]:
            click.echo(line, color=shell.color)
    else:
        click.echo(dumps(values(view), form))


def values(view: View) -> dict[str, object]:
    """For programs: what is shown, and every metric."""
    items, agents, answer = view
    seen = {one.endpoint: one for one in answer.endpoints}
    nodes = {one.agent: one for one in answer.nodes}
    return {
        "endpoints": [
            {
                "name": item.name,
                "status": tables.status_word(item),
                "ready_replicas": item.ready_replicas,
                "desired_replicas": item.desired_replicas,
                "address": item.address,
                "measured": _value(seen.get(item.name)),
            }
            for item in ranked(items, seen)
        ],
        "nodes": [
            {
                "name": agent.name,
                "status": tables.agent_word(agent),
                "session_count": agent.session_count,
                "slots": [to_value(slot) for slot in agent.slots],
                "measured": _value(nodes.get(agent.name)),
            }
            for agent in agents
        ],
    }


def _value(message: EndpointMeasurements | NodeMeasurements | None) -> dict[str, object] | None:
    return to_value(message) if message is not None else None


def lines(view: View, *, color: bool, rows_max: int, width: int | None = None) -> list[str]:
    """A sentence, the endpoints and the nodes, in at most `rows_max` lines."""
    items, agents, answer = view
    seen = {one.endpoint: one for one in answer.endpoints}
    total = sum(one.requests_per_second for one in answer.endpoints)
    ready = sum(item.ready_replicas for item in items)
    head = (
        f"{len(items)} endpoint{'' if len(items) == 1 else 's'}, {ready} replicas ready, "
        f"{figure(total)} requests/s, {len(agents)} node{'' if len(agents) == 1 else 's'}"
    )
    # The sentence, an empty line, two headers, and two lines that say how many are left out.
    room = max(rows_max - 6, 2)
    for_nodes = min(len(agents), max(min(NODE_ROWS_MIN, room // 2), room - len(items)))
    for_endpoints = max(room - for_nodes, 1)
    page = [head, *_cut(endpoints(ranked(items, seen), seen), for_endpoints).lines(color=color, width=width)]
    if len(items) > for_endpoints:
        page.append(f"and {len(items) - for_endpoints} more endpoints")
    if agents:
        nodes = {one.agent: one for one in answer.nodes}
        page += ["", *_cut(_nodes(agents, nodes), for_nodes).lines(color=color, width=width)]
        if len(agents) > for_nodes:
            page.append(f"and {len(agents) - for_nodes} more nodes")
    return page[:rows_max]


def ranked(items: Sequence[Endpoint], seen: Mapping[str, EndpointMeasurements]) -> list[Endpoint]:
    """The busiest first, then by name."""
    return sorted(
        items,
        key=lambda item: (-seen[item.name].requests_per_second if item.name in seen else 0.0, item.name),
    )


def endpoints(items: Sequence[Endpoint], seen: Mapping[str, EndpointMeasurements]) -> Table:
    header = ["ENDPOINT", "STATUS", "READY", "RPS", "CONC", "QUEUE", "P50", "P95", "ERR%", "ADDRESS"]
    rows = []
    for item in items:
        one = seen.get(item.name)
        found = ["", "", "", "", "", ""]
        if one is not None:
            found = [
                figure(one.requests_per_second),
                figure(one.concurrency),
                figure(one.queue),
                milliseconds(one.latency_p50_ms),
                milliseconds(one.latency_p95_ms),
                figure(one.error_rate * 100),
            ]
        rows.append(
            [
                tables.last(item.name),
                tables.status_word(item),
                f"{item.ready_replicas}/{item.desired_replicas}",
                *found,
                item.address,
            ]
        )
    return Table(header, list(rows), status=1)


def _nodes(agents: Sequence[Agent], seen: Mapping[str, NodeMeasurements]) -> Table:
    rows = []
    for agent in agents:
        slots = {slot.slot: slot for slot in agent.slots}
        one = seen.get(agent.name)
        cores = slots["cpu"].capacity if "cpu" in slots else ""
        memory = tables.amount_text("mem", slots["mem"].capacity) if "mem" in slots else ""
        shares = slots.get("cuda.shares")
        rows.append(
            [
                tables.last(agent.name),
                tables.agent_word(agent),
                f"{figure(one.cpu_used)}/{cores}" if one is not None else "",
                f"{human_bytes(round(one.mem))}/{memory}" if one is not None else "",
                human_bytes(round(one.cuda_mem)) if one is not None and one.cuda_mem else "",
                f"{shares.used or '0'}/{shares.capacity}" if shares is not None else "",
                str(agent.session_count),
            ]
        )
    return Table(["NODE", "STATUS", "CPU", "MEM", "GPU MEM", "SHARES", "SESSIONS"], list(rows), status=1)


def _cut(table: Table, rows: int) -> Table:
    return Table(table.header, table.rows[:rows], table.status)
