"""The options of `dure agent`, and what they come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

from dure.agent import machine, ports
from dure.agent.enforcement import choice
from dure.agent.enforcement.modes import Asked
from dure.agent.enforcement.watchdog import ALLOWANCE_MIB
from dure.agent.leases import default_lease_dir
from dure.wire import names, programs, quantities, settings
from dure.wire.enforcement import HOOK

BACKENDS_GROUP = "dure.agent.backends"


@dataclass(frozen=True)
class Options:
    """The options, checked. `home` is the agent's own folder."""

    name: str
    home: Path
    manager: str
    join_token: str
    resource_group: str
    advertise_address: str
    simulated_gpus: int
    cpu_milli: int
    memory_milli: int
    enforcement: Asked
    session_ports: range
    lease_dir: Path
    folder_cache_bytes: int
    numa_pinning: bool
    overlay: bool
    metrics_bind: str
    metrics_port: int
    backend: str


def _take_up(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Makes what an agent was given the first time the defaults, once its folder and name are known."""
    context.meta[f"dure.{parameter.name}"] = value
    data_dir, known = context.meta.get("dure.data_dir"), "dure.name" in context.meta
    if data_dir is None or not known:
        return value
    name = context.meta["dure.name"] or _only_member(data_dir)
    context.meta["dure.name"] = name
    settings.apply_recorded(context, programs.agent_dir(data_dir, name) / "settings.toml")
    return value


def _only_member(data_dir: Path) -> str:
    recorded = programs.recorded_members(data_dir, "agents")
    if len(recorded) > 1:
        raise click.UsageError(
            f"{data_dir} has several agents ({', '.join(recorded)}): say which with --name"
        )
    return recorded[0] if recorded else "agent-1"


_OPTIONS = (
    click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        default=settings.default_data_dir,
        show_default="~/.local/share/dure",
        is_eager=True,
        callback=_take_up,
        help="Folder of all state.",
    ),
    click.option(
        "--name",
        is_eager=True,
        callback=_take_up,
        show_default="the one recorded in the data folder, else agent-1",
        help="Name of this agent.",
    ),
    click.option("--manager", default="127.0.0.1:7070", show_default=True, help="Address of the manager."),
    click.option(
        "--join-token", default="", help="Secret for the first join; not kept.  [env: DURE_JOIN_TOKEN]"
    ),
    click.option(
        "--resource-group", default="default", show_default=True, help="Group that its node belongs to."
    ),
    click.option(
        "--advertise-address",
        default="",
        show_default="its local address towards the manager",
        help="Address at which proxies reach its sessions.",
    ),
    click.option(
        "--simulated-gpus",
        type=click.IntRange(0, 1024),
        default=0,
        show_default=True,
        help="GPUs to pretend, if the node has none.",
    ),
    click.option(
        "--backend",
        default="process",
        show_default=True,
        help="What runs its sessions: `process`, `docker`, or a plug-in's.",
    ),
    click.option(
        "--engine",
        default="",
        envvar="DOCKER_HOST",
        show_default="DOCKER_HOST, else unix:///var/run/docker.sock",
        help="Where the container engine listens, for --backend docker.",
    ),
    click.option(
        "--gpu-attach",
        type=click.Choice(["auto", "environment"]),
        default="auto",
        show_default=True,
        help="How containers get GPUs: by the NVIDIA runtime or CDI, or by NVIDIA_VISIBLE_DEVICES alone.",
    ),
    click.option(
        "--gpu-enforcement",
        type=click.Choice(choice.OPTIONS),
        default=choice.AUTO,
        show_default="auto: hook if there is a library, else watchdog",
        help="What keeps sessions within their shares of GPUs.",
    ),
    click.option(
        "--hook-library",
        type=click.Path(path_type=Path, dir_okay=False),
        help="HAMi-core's libvgpu.so, to be loaded into sessions with shares of GPUs.",
    ),
    click.option(
        "--gpu-allowance-mib",
        type=click.IntRange(0, 1024 * 1024),
        default=ALLOWANCE_MIB,
        show_default=True,
        help="MiB of each GPU that a session may hold beyond its share before the watchdog ends it.",
    ),
    click.option("--cpus", default="", show_default="all", help="Cores to offer, such as 3.5."),
    click.option("--memory", default="", show_default="all", help="Memory to offer, such as 16g."),
    click.option(
        "--session-ports", default="20000-29999", show_default=True, help="Ports to lease to sessions."
    ),
    click.option(
        "--lease-dir",
        type=click.Path(path_type=Path, file_okay=False),
        default=default_lease_dir,
        show_default="/run/dure as root, else /tmp/dure-UID",
        help="Where all agents of this host keep their port leases.",
    ),
    click.option(
        "--folder-cache", default="100g", show_default=True, help="Bound of the cache of fetched folders."
    ),
    click.option(
        "--numa-pinning",
        is_flag=True,
        help="Keep sessions on the cores and memory that are near their GPUs.",
    ),
    click.option(
        "--no-overlay",
        is_flag=True,
        help="Sessions over several nodes have the network of each node, though its engine is in a swarm.",
    ),
    click.option(
        "--metrics-port",
        type=click.IntRange(0, 65535),
        default=0,
        show_default="0, none",
        help="HTTP port of /metrics.",
    ),
    click.option(
        "--metrics-bind",
        default="127.0.0.1",
        show_default=True,
        help="Address of /metrics; anybody may read it.",
    ),
    click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        show_default=True,
        help="Least level that is logged.",
    ),
    click.option(
        "--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Log there, not to stderr."
    ),
    click.option(
        "--stop-sessions", is_flag=True, help="Stop all sessions that an agent left running, and exit."
    ),
)


def declare(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command. The agent's name is in the context's `meta["dure.name"]`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def checked(name: str, given: dict[str, Any]) -> Options:
    """Raises click.UsageError that says what is wrong."""
    violation = names.check_id(name, names.MEMBER_ID, "--name")
    if violation is not None:
        raise click.BadParameter(violation.description, param_hint="--name")
    host, colon, port = given["manager"].rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise click.BadParameter(f"`{given['manager']}` is not HOST:PORT", param_hint="--manager")
    try:
        session_ports = ports.parse_range(given["session_ports"])
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--session-ports") from error
    if given["gpu_enforcement"] == HOOK and given["hook_library"] is None:
        raise click.UsageError("--gpu-enforcement hook needs the library: give it with --hook-library")
    return Options(
        name=name,
        home=programs.agent_dir(given["data_dir"].absolute(), name),
        manager=given["manager"],
        join_token=given["join_token"],
        resource_group=given["resource_group"],
        advertise_address=given["advertise_address"],
        simulated_gpus=given["simulated_gpus"],
        cpu_milli=_amount("--cpus", quantities.CPU, given["cpus"]) or machine.cpu_milli(),
        memory_milli=_amount("--memory", quantities.MEM, given["memory"])
        or machine.memory_bytes() * quantities.MILLI,
        enforcement=Asked(
            given["gpu_enforcement"], _absolute(given["hook_library"]), given["gpu_allowance_mib"]
        ),
        session_ports=session_ports,
        lease_dir=given["lease_dir"],
        folder_cache_bytes=_amount("--folder-cache", quantities.MEM, given["folder_cache"])
        // quantities.MILLI,
        numa_pinning=given["numa_pinning"],
        overlay=not given["no_overlay"],
        metrics_bind=given["metrics_bind"],
        metrics_port=given["metrics_port"],
        backend=known_backend(given["backend"]),
    )


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def known_backend(name: str) -> str:
    """Raises click.BadParameter if it is not installed."""
    known = sorted(entry.name for entry in entry_points(group=BACKENDS_GROUP))
    if name not in known:
        raise click.BadParameter(
            f"there is no back end `{name}` here; there are: {', '.join(known)}", param_hint="--backend"
        )
    return name


def _amount(option: str, slot: str, text: str) -> int:
    """Milli-units, 0 if it is not given."""
    if not text:
        return 0
    try:
        return quantities.parse_slot(slot, text)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint=option) from error
