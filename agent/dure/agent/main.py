"""`dure agent`: the command, and the order in which its parts come up and go down."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import signal
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import click
import uvloop

from dure.agent import exposition, machine, ports, prober
from dure.agent.accelerators import Accelerator, Request
from dure.agent.backends.base import Abilities, Backend
from dure.agent.device_watch import DeviceWatch
from dure.agent.enforcement import choice
from dure.agent.enforcement.modes import Asked, Modes
from dure.agent.enforcement.watchdog import ALLOWANCE_MIB
from dure.agent.folders import Folders
from dure.agent.guard import Guard
from dure.agent.leases import Leases, default_lease_dir
from dure.agent.link import Link, Refused
from dure.agent.log_archive import LogArchive
from dure.agent.log_sender import LogSender
from dure.agent.measurer import Measurer
from dure.agent.node import Node
from dure.agent.storage import ManagerStorage
from dure.agent.supervisor import Supervisor
from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.wire import channel, identity, logs, metrics_server, names, programs, quantities, settings, tracing
from dure.wire.backoff import backoff_s
from dure.wire.enforcement import HOOK
from dure.wire.errors import DureError

PROTOCOL_VERSION = 1
BACKENDS_GROUP = "dure.agent.backends"
_NOT_RECORDED = ("data_dir", "name", "join_token", "stop_sessions")
_log = logging.getLogger(__name__)


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


@click.command(name="agent", context_settings=settings.CONTEXT_SETTINGS)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=settings.default_data_dir,
    show_default="~/.local/share/dure",
    is_eager=True,
    callback=_take_up,
    help="Folder of all state.",
)
@click.option(
    "--name",
    is_eager=True,
    callback=_take_up,
    show_default="the one recorded in the data folder, else agent-1",
    help="Name of this agent.",
)
@click.option("--manager", default="127.0.0.1:7070", show_default=True, help="Address of the manager.")
@click.option("--join-token", default="", help="Secret for the first join; not kept.  [env: DURE_JOIN_TOKEN]")
@click.option(
    "--resource-group", default="default", show_default=True, help="Group that its node belongs to."
)
@click.option(
    "--advertise-address",
    default="",
    show_default="its local address towards the manager",
    help="Address at which proxies reach its sessions.",
)
@click.option(
    "--simulated-gpus",
    type=click.IntRange(0, 1024),
    default=0,
    show_default=True,
    help="GPUs to pretend, if the node has none.",
)
@click.option(
    "--backend",
    default="process",
    show_default=True,
    help="What runs its sessions: `process`, `docker`, or a plug-in's.",
)
@click.option(
    "--engine",
    default="",
    envvar="DOCKER_HOST",
    show_default="DOCKER_HOST, else unix:///var/run/docker.sock",
    help="Where the container engine listens, for --backend docker.",
)
@click.option(
    "--gpu-attach",
    type=click.Choice(["auto", "environment"]),
    default="auto",
    show_default=True,
    help="How containers get GPUs: by the NVIDIA runtime or CDI, or by NVIDIA_VISIBLE_DEVICES alone.",
)
@click.option(
    "--gpu-enforcement",
    type=click.Choice(choice.OPTIONS),
    default=choice.AUTO,
    show_default="auto: hook if there is a library, else watchdog",
    help="What keeps sessions within their shares of GPUs.",
)
@click.option(
    "--hook-library",
    type=click.Path(path_type=Path, dir_okay=False),
    help="HAMi-core's libvgpu.so, to be loaded into sessions with shares of GPUs.",
)
@click.option(
    "--gpu-allowance-mib",
    type=click.IntRange(0, 1024 * 1024),
    default=ALLOWANCE_MIB,
    show_default=True,
    help="MiB of each GPU that a session may hold beyond its share before the watchdog ends it.",
)
@click.option("--cpus", default="", show_default="all", help="Cores to offer, such as 3.5.")
@click.option("--memory", default="", show_default="all", help="Memory to offer, such as 16g.")
@click.option("--session-ports", default="20000-29999", show_default=True, help="Ports to lease to sessions.")
@click.option(
    "--lease-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_lease_dir,
    show_default="/run/dure as root, else /tmp/dure-UID",
    help="Where all agents of this host keep their port leases.",
)
@click.option(
    "--folder-cache", default="100g", show_default=True, help="Bound of the cache of fetched folders."
)
@click.option(
    "--numa-pinning",
    is_flag=True,
    help="Keep sessions on the cores and memory that are near their GPUs.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default="0, none",
    help="HTTP port of /metrics.",
)
@click.option(
    "--metrics-bind", default="127.0.0.1", show_default=True, help="Address of /metrics; anybody may read it."
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least level that is logged.",
)
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Log there, not to stderr.")
@click.option("--stop-sessions", is_flag=True, help="Stop all sessions that an agent left running, and exit.")
@click.pass_context
def main(context: click.Context, /, **given: Any) -> None:
    """Runs the sessions of one node.

    SIGTERM ends the agent and leaves its sessions running; SIGINT (Ctrl-C) stops them too.
    """
    data_dir: Path = given["data_dir"]
    options = _checked(context.meta["dure.name"], given)
    logs.set_up(given["log_level"], given["log_file"])
    # Back ends know but the agent's folder; what else they read is in the environment, as `docker` itself
    # does.
    if given["engine"]:
        os.environ["DOCKER_HOST"] = given["engine"]
    os.environ["DURE_GPU_ATTACH"] = given["gpu_attach"]
    try:
        with programs.running(data_dir, options.name, options.home):
            if given["stop_sessions"]:
                uvloop.run(_stop_sessions(options))
                return
            if identity.load(options.home) is None and not options.join_token:
                raise click.ClickException(
                    f"agent `{options.name}` has not joined yet: give it a join token, made by an "
                    "administrator of the manager, with --join-token or DURE_JOIN_TOKEN"
                )
            kept = {key: _plain(value) for key, value in given.items() if key not in _NOT_RECORDED}
            settings.write_toml(options.home / "settings.toml", kept)
            uvloop.run(_serve(options))
    except (DureError, Refused) as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"cannot run agent `{options.name}`: {error}") from error


def _plain(value: Any) -> Any:
    return str(value.absolute()) if isinstance(value, Path) else value


def _checked(name: str, given: dict[str, Any]) -> Options:
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
        metrics_bind=given["metrics_bind"],
        metrics_port=given["metrics_port"],
        backend=_known_backend(given["backend"]),
    )


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.absolute()


def _known_backend(name: str) -> str:
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


async def _serve(options: Options) -> None:
    """Until a signal comes. Raises Refused if the manager does not let it join."""
    asked = _on_signals()
    host = options.advertise_address or await _advertised(options.manager, asked)
    backend = _load_backend(options)
    abilities = await backend.probe()
    plugins = _load_accelerators()
    limitations = [*abilities.limitations, *_no_pinning(options, abilities)]
    for limitation in limitations:
        _log.warning("%s", limitation)
    traces = tracing.set_up("agent", options.name)
    async with channel.open_channel(options.manager) as connection, prober.open_session() as http:
        stub: fleet_pb2_grpc.FleetServiceAsyncStub = fleet_pb2_grpc.FleetServiceStub(connection)
        storage = ManagerStorage(stub)
        devices: dict[str, fleet_pb2.Device] = {}
        modes = Modes(options.home, options.enforcement, backend.contains, devices)
        node = _node(options, host, backend, devices, modes, storage, http, traces)
        supervisor = Supervisor(options.home, node)
        guard = Guard(modes, backend, devices, supervisor.guarded, supervisor.condemn)
        watch = DeviceWatch(
            plugins,
            Request(options.name, options.simulated_gpus),
            devices,
            supervisor,
            supervisor.changed.set,
            file=options.home / "devices.pb",
            held=await supervisor.held_before(),
            limitations=limitations,
            withheld=abilities.no_devices,
            on_round=guard.look,
        )
        watching = asyncio.create_task(watch.run())
        await watch.first()
        await supervisor.adopt()

        def hello() -> fleet_pb2.Hello:
            return _hello(options, host, backend.name, abilities, watch)

        logs_sent = LogSender(stub, node.logs, supervisor.has_ended)
        measurer = Measurer(
            backend, plugins, devices, supervisor.running, supervisor.changed.set, node.counts
        )
        link = Link(
            name=options.name,
            home=options.home,
            join_token=options.join_token,
            hello=hello,
            stub=stub,
            supervisor=supervisor,
            storage=storage,
            logs=logs_sent,
            measurer=measurer,
            watch=watch,
        )

        async def page() -> str:
            return exposition.render(
                agent=options.name,
                version=version("dure"),
                connected=link.connected,
                streams=link.streams,
                phases=supervisor.phases(),
                newest=measurer.newest,
                devices=list(devices.values()),
                counts=node.counts,
            )

        async with metrics_server.serving(options.metrics_bind, options.metrics_port, page):
            linked = asyncio.create_task(link.run())
            working = [
                linked,
                watching,
                *(asyncio.create_task(part.run()) for part in (node.logs, measurer, backend)),
            ]
            waited: set[asyncio.Future[Any]] = {asked, linked}
            try:
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            finally:
                # First: the manager must not answer the end of sessions by placing new ones here.
                for task in working:
                    task.cancel()
                await asyncio.wait(working)
                await logs_sent.close()
        if asked.done() and asked.result() == signal.SIGINT:
            _log.info("stopping all sessions")
            await supervisor.stop_all()
            await modes.close()
        else:
            await supervisor.detach()
            await modes.detach()
        await backend.close()
        if traces is not None:
            await traces.close()
        if not linked.cancelled() and (error := linked.exception()) is not None:
            raise error


async def _stop_sessions(options: Options) -> None:
    backend = _load_backend(options)
    await backend.probe()
    async with channel.open_channel(options.manager) as connection, prober.open_session() as http:
        storage = ManagerStorage(fleet_pb2_grpc.FleetServiceStub(connection))
        modes = Modes(options.home, options.enforcement, backend.contains, {})
        node = _node(options, "127.0.0.1", backend, {}, modes, storage, http)
        await Supervisor(options.home, node).stop_found()
        await modes.close()
        await backend.close()


def _node(
    options: Options,
    host: str,
    backend: Backend,
    devices: dict[str, fleet_pb2.Device],
    modes: Modes,
    storage: ManagerStorage,
    http: Any,
    traces: tracing.Tracing | None = None,
) -> Node:
    return Node(
        agent=options.name,
        host=host,
        backend=backend,
        leases=Leases(options.lease_dir, options.session_ports),
        folders=Folders(options.home, storage, options.folder_cache_bytes),
        devices=devices,
        http=http,
        logs=LogArchive(options.home),
        storage=storage,
        modes=modes,
        numa_nodes=machine.numa_nodes() if options.numa_pinning else {},
        tracing=traces,
    )


def _on_signals() -> asyncio.Future[signal.Signals]:
    loop = asyncio.get_running_loop()
    asked: asyncio.Future[signal.Signals] = loop.create_future()

    def ask(number: signal.Signals) -> None:
        if not asked.done():
            asked.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask, number)
    return asked


async def _advertised(manager: str, asked: asyncio.Future[signal.Signals]) -> str:
    """Empty if a signal came first."""
    attempt = 0
    while not asked.done():
        try:
            return await machine.local_address(manager)
        except OSError as error:
            attempt += 1
            if attempt == 1:
                _log.warning("cannot find the way to the manager at %s (%s); trying again", manager, error)
            await asyncio.wait({asked}, timeout=backoff_s(attempt, first_s=0.1, max_s=1.0, jitter=0.0))
    return ""


def _load_backend(options: Options) -> Backend:
    (entry,) = entry_points(group=BACKENDS_GROUP, name=options.backend)
    backend: Backend = entry.load()(options.home)
    return backend


def _load_accelerators() -> list[Accelerator]:
    """In the order in which they are asked."""
    plugins: list[Accelerator] = [entry.load()() for entry in entry_points(group="dure.agent.accelerators")]
    return sorted(plugins, key=lambda plugin: plugin.order)


def _no_pinning(options: Options, abilities: Abilities) -> list[str]:
    why = abilities.no_pinning or ("" if machine.numa_nodes() else "the machine does not tell its NUMA nodes")
    return [f"sessions are not pinned to NUMA nodes: {why}"] if options.numa_pinning and why else []


def _hello(
    options: Options, host: str, backend: str, abilities: Abilities, watch: DeviceWatch
) -> fleet_pb2.Hello:
    return fleet_pb2.Hello(
        protocol_version=PROTOCOL_VERSION,
        version=version("dure"),
        resource_group=options.resource_group,
        advertise_address=host,
        host_id=machine.host_id(),
        boot_id=machine.boot_id(),
        backend=backend,
        slots={quantities.CPU: options.cpu_milli, quantities.MEM: options.memory_milli},
        devices=watch.begin_stream(),
        limitations=watch.limitations,
        maps_mounts=abilities.maps_mounts,
        runs_images=abilities.runs_images,
        architecture=platform.machine(),
        security_profiles=[
            fleet_pb2.SECURITY_PROFILE_DEFAULT,
            *([fleet_pb2.SECURITY_PROFILE_STRICT] if abilities.can_be_strict else []),
        ],
    )


if __name__ == "__main__":
    # Read by the client's entry point too; here so that `python -m dure.agent.main` works without it.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    main()
