"""`dure agent`: the command, and the order in which its parts come up and go down."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import platform
import signal
from collections.abc import Coroutine
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any, TypeVar

import click
import uvloop

from dure.agent import exposition, machine, prober
from dure.agent.accelerators import Accelerator, Request
from dure.agent.backends.base import Abilities, Backend
from dure.agent.device_watch import DeviceWatch
from dure.agent.enforcement.modes import Modes
from dure.agent.folders import Folders
from dure.agent.guard import Guard
from dure.agent.leases import Leases
from dure.agent.link import Link, Refused
from dure.agent.log_archive import LogArchive
from dure.agent.log_sender import LogSender
from dure.agent.measurer import Measurer
from dure.agent.node import Node
from dure.agent.options import BACKENDS_GROUP, Options, checked, declare
from dure.agent.storage import ManagerStorage
from dure.agent.supervisor import Supervisor
from dure.agent.waiting import watched
from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.wire import channel, identity, logs, metrics_server, programs, quantities, settings, tracing
from dure.wire.backoff import backoff_s
from dure.wire.errors import DureError

PROTOCOL_VERSION = 1
_T = TypeVar("_T")
_NOT_RECORDED = ("data_dir", "name", "join_token", "stop_sessions")
_log = logging.getLogger(__name__)


@click.command(name="agent", context_settings=settings.CONTEXT_SETTINGS)
@declare
@click.pass_context
def main(context: click.Context, /, **given: Any) -> None:
    """Runs the sessions of one node.

    SIGTERM ends the agent and leaves its sessions running; SIGINT (Ctrl-C) stops them too.
    """
    data_dir: Path = given["data_dir"]
    options = checked(context.meta["dure.name"], given)
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


class _ToldToGo(Exception):
    """SIGTERM came before the agent was up."""


async def _serve(options: Options) -> None:
    """Until a signal comes. Raises Refused if the manager does not let it join."""
    with contextlib.suppress(_ToldToGo):
        await _come_up_and_serve(options, _on_signals())


async def _unless_told(asked: asyncio.Future[signal.Signals], work: Coroutine[Any, Any, _T]) -> _T:
    """What may wait for a container engine or a driver. SIGINT waits too: it has sessions to stop, which are
    not known yet. Raises _ToldToGo."""
    task = asyncio.create_task(work)
    both: set[asyncio.Future[Any]] = {asked, task}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not task.done() and asked.result() == signal.SIGTERM:
        task.cancel()
        await asyncio.wait([task])
        raise _ToldToGo
    return await task


async def _come_up_and_serve(options: Options, asked: asyncio.Future[signal.Signals]) -> None:
    host = options.advertise_address or await _advertised(options.manager, asked)
    backend = _load_backend(options)
    abilities = await _unless_told(asked, backend.probe())
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
            held=await _unless_told(asked, supervisor.held_before()),
            limitations=limitations,
            withheld=abilities.no_devices,
            on_round=guard.look,
        )
        watching = watched(watch.run(), "watching devices")
        try:
            await _unless_told(asked, watch.first())
            await _unless_told(asked, supervisor.adopt())
        except _ToldToGo:
            watching.cancel()
            await asyncio.wait([watching])
            await supervisor.detach()
            await modes.detach()
            await backend.close()
            raise

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
                watched(node.logs.run(), "keeping logs"),
                watched(measurer.run(), "measuring"),
                watched(backend.run(), f"back end {backend.name}"),
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
        count = await Supervisor(options.home, node).stop_found()
        click.echo(f"{count} session{'' if count == 1 else 's'} of agent `{options.name}` stopped", err=True)
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
        overlay=abilities.overlay if options.overlay else "",
        makes_overlay=abilities.makes_overlay and options.overlay,
        security_profiles=[
            fleet_pb2.SECURITY_PROFILE_DEFAULT,
            *([fleet_pb2.SECURITY_PROFILE_STRICT] if abilities.can_be_strict else []),
        ],
    )


if __name__ == "__main__":
    # Read by the client's entry point too; here so that `python -m dure.agent.main` works without it.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    main()
