"""`dure rule record`: what is measured of an endpoint, as a file to simulate rules with."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

import click

from dure.client.cli import tables
from dure.client.cli.options import Duration, Shell, command
from dure.client.cli.rule import rule
from dure.client.client import Client
from dure.client.recording import SERIES_MAX, Recording
from dure.client.simulation import SECONDS_MAX
from dure.v1.scaling_pb2 import EndpointMeasurements, ScalingRule
from dure.wire.errors import ManagerUnreachable

INTERVAL_S = 1.0


@command(rule, "record")
@click.argument("endpoint")
@click.option("--for", "for_s", type=Duration(), default=60.0, show_default="60s", help="How long.")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="Others than those of the rules.")
@click.option("--all", "all_", is_flag=True, help="Every metric that rules could use.")
async def record(shell: Shell, endpoint: str, for_s: float, metrics: tuple[str, ...], all_: bool) -> None:
    """Write what is measured of an endpoint as a file for `dure rule simulate`.

    \b
    dure rule record chat --for 5m > chat.yaml      # Ctrl-C ends it earlier, and keeps what there is
    dure rule simulate chat.yaml

    Keeps what the endpoint's rules use and what proxies see, and the rules.
    """
    if not 0 < for_s <= SECONDS_MAX:
        raise click.UsageError(f"--for takes more than 0 and at most {SECONDS_MAX} seconds")
    async with shell.client() as client:
        item = await client.endpoints.get(endpoint)
        rules = [item async for item in client.rules.list(endpoint)]
        recording = Recording(None if all_ else _wanted(rules, metrics))
        began = asyncio.get_running_loop().time()
        # Ctrl-C: what was seen until now is worth keeping.
        with contextlib.suppress(asyncio.CancelledError):
            await _take(shell, client, item.name, recording, for_s)
        took = min(asyncio.get_running_loop().time() - began, for_s)
    click.echo(
        recording.text(rules, item.desired_replicas, took, item.scale_to_zero_after.ToNanoseconds() / 1e9),
        nl=False,
    )
    if recording.left_out:
        click.echo(f"warning: more than {SERIES_MAX} metrics; --metric chooses", err=True)
    if not recording.series:
        click.echo(f"warning: nothing was measured of endpoint {tables.last(endpoint)}", err=True)


async def _take(shell: Shell, client: Client, name: str, recording: Recording, for_s: float) -> None:
    clock = asyncio.get_running_loop().time
    began = clock()
    while (second := clock() - began) < for_s:
        try:
            seen, totals = await client.rules.explain(name, decisions_max=1), await client.measurements()
        except ManagerUnreachable:
            # A manager that restarts measures nothing meanwhile, and the recording goes on.
            recording.add(round(second, 1), (), EndpointMeasurements())
        else:
            recording.add(round(second, 1), seen.metrics, _of(totals.endpoints, name))
        if shell.live:
            told = f"\r{second:4.0f} of {for_s:g} s, {len(recording.series)} metrics "
            click.echo(told, nl=False, err=True)
        pause_s = INTERVAL_S - (clock() - began) % INTERVAL_S
        await asyncio.sleep(min(pause_s, max(for_s - (clock() - began), 0.0)))
    if shell.live:
        click.echo(err=True)


def _of(found: Iterable[EndpointMeasurements], name: str) -> EndpointMeasurements:
    return next((one for one in found if one.endpoint == name), EndpointMeasurements())


def _wanted(rules: list[ScalingRule], metrics: tuple[str, ...]) -> set[str]:
    seen_by_proxies = ("requests_per_second", "concurrency", "queue", "latency:p95")
    return {*metrics, *(item.metric_name for item in rules), *(f"proxy/{name}" for name in seen_by_proxies)}
