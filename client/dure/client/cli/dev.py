"""`dure dev`: a whole cluster on this machine."""

from __future__ import annotations

import asyncio
import os
from importlib.metadata import entry_points
from pathlib import Path

import click

from dure.client.cli.tables import amount_text
from dure.client.context import context_path, load_context
from dure.client.dev.cluster import DevCluster, Plan
from dure.client.dev.foreground import in_foreground, make_plan
from dure.client.dev.ports import WantedPorts, parse_pool
from dure.v1.agent_pb2 import Agent
from dure.wire import programs
from dure.wire.errors import DureError
from dure.wire.settings import CONTEXT_SETTINGS, default_data_dir, write_file

AGENTS_MAX = 16


def _pool(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int] | None:
    try:
        return None if text is None else parse_pool(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _installed(_: click.Context, __: click.Parameter, name: str) -> str:
    """Before anything is started: the agents would refuse it only then."""
    known = sorted(entry.name for entry in entry_points(group="dure.agent.backends"))
    if name not in known:
        raise click.BadParameter(f"there is no back end `{name}` here; there are: {', '.join(known)}")
    return name


@click.command(context_settings=CONTEXT_SETTINGS)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where all state is kept; default $XDG_DATA_HOME/dure.",
)
@click.option("--manager-port", type=click.IntRange(1, 65535), help="gRPC; default 7070, or a free one.")
@click.option(
    "--proxy-ports", callback=_pool, metavar="A-B", help="For endpoints; default 7100-7199, or free ones."
)
@click.option("--proxy-admin-port", type=click.IntRange(1, 65535), help="Default 7099, or a free one.")
@click.option(
    "--agents",
    type=click.IntRange(0, AGENTS_MAX),
    default=1,
    show_default=True,
    help="How many; each registers the whole machine.",
)
@click.option(
    "--simulated-gpus",
    type=click.IntRange(0, 64),
    default=2,
    show_default=True,
    help="GPUs to pretend for each agent where there are none.",
)
@click.option(
    "--backend",
    default="process",
    show_default=True,
    callback=_installed,
    help="What runs sessions: `process`, or `docker` (DOCKER_HOST names its socket).",
)
def dev(
    data_dir: Path | None,
    manager_port: int | None,
    proxy_ports: tuple[int, int] | None,
    proxy_admin_port: int | None,
    agents: int,
    simulated_gpus: int,
    backend: str,
) -> None:
    """Run a whole cluster on this machine: manager, agents, proxy; no GPU needed, and no container engine.

    Ports are recorded in the data folder and used again. Programs that die are reported, not restarted.
    Ctrl-C stops everything, sessions too.
    """
    folder = (data_dir or default_data_dir()).resolve()
    wanted = WantedPorts(manager_port, proxy_admin_port, proxy_ports)

    async def body() -> None:
        plan = make_plan(folder, wanted, agents, simulated_gpus, None, say, backend)
        cluster = DevCluster(plan, say)
        await in_foreground(cluster, context_files(folder), summarise, None)

    with programs.running(folder, "dev", folder / "dev"):
        asyncio.run(body())
    click.echo("stopped; nothing is left running", err=True)


def say(text: str) -> None:
    click.echo(text, err=True)


def context_files(data_dir: Path) -> list[Path]:
    """Where the context goes: into the data folder, and to the user's own place unless that was moved."""
    own = data_dir / "context.toml"
    if os.environ.get("DURE_CONTEXT_FILE"):
        return [own]
    users = context_path()
    try:
        before = load_context(users)
    except DureError:
        return [own, users]
    if not before.manager.startswith("127.0.0.1:"):
        # It may hold the only copy of a key to a real cluster.
        kept = users.with_name("context.before-dev.toml")
        write_file(kept, users.read_bytes())
        say(f"the context for {before.manager} was kept as {kept}")
    return [own, users]


async def summarise(cluster: DevCluster) -> None:
    """Tells what runs where, and what to try."""
    plan = cluster.plan
    own = plan.data_dir / "context.toml"
    named = os.environ.get("DURE_CONTEXT_FILE")
    agents = await cluster.agents()
    lines = [
        "",
        "Dure is up.",
        f"  manager    {plan.manager_address}",
        f"  endpoints  ports {plan.ports.pool[0]}-{plan.ports.pool[1]} at 127.0.0.1 "
        f"(proxy admin: http://127.0.0.1:{plan.ports.admin})",
        *(f"  {agent.name.rsplit('/', 1)[-1]:<10} {capacity(agent)}" for agent in agents),
        *(["  metrics    " + metrics_text(plan)] if plan.metrics_ports else []),
        f"  data       {plan.data_dir}",
        f"  context    {own}" + ("" if named else f", also {context_path()}"),
        "",
        "Try, in another terminal:",
    ]
    if named and Path(named).resolve() != own:
        lines.append(f"  export DURE_CONTEXT_FILE={own}")
    image = "" if plan.backend == "process" else "--image IMAGE "
    lines += [
        "  dure folder create mymodel --usage model && dure folder upload mymodel DIR",
        f"  dure endpoint create chat --model mymodel {image}-r cpu=1 -r mem=1g -r cuda.shares=0.5 --wait",
        "  dure token create chat --expires 1h",
        "",
        "Ctrl-C stops everything, sessions included.",
    ]
    click.echo("\n".join(lines))


def metrics_text(plan: Plan) -> str:
    """Where /metrics is, manager and proxy and agents."""
    manager, *agents = plan.metrics_ports
    known = {"manager": manager, "proxy": plan.ports.admin}
    known |= {f"agent-{number}": port for number, port in enumerate(agents, 1)}
    return "http://127.0.0.1:PORT/metrics, PORT " + ", ".join(f"{port} {who}" for who, port in known.items())


def capacity(agent: Agent) -> str:
    """`4 CPUs, 15.5 GiB, 2 GPUs, SIMULATED: ...`."""
    slots = {slot.slot: slot.capacity for slot in agent.slots}
    text = f"{slots.get('cpu', '0')} CPUs, {amount_text('mem', slots.get('mem', '0'))} memory"
    count = len(agent.devices)
    if not count:
        return f"{text}, no GPUs"
    text += f", {count} GPU{'s' if count > 1 else ''}"
    if all(device.accelerator == "simulated" for device in agent.devices):
        return f"{text}, SIMULATED: shares are counted as on real ones, but nothing computes on them"
    return f"{text} ({', '.join(sorted({device.model for device in agent.devices}))})"
