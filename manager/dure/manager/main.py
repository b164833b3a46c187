"""`dure manager`: the gRPC API, the controller, and what agents and proxies connect to."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import grpc.aio
import uvloop
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health
from sqlalchemy import select

from dure.manager import exposition, schema, services
from dure.manager.admin_api import AdminApi
from dure.manager.agent_api import AgentApi
from dure.manager.audit import Trail
from dure.manager.auth import Gatekeeper
from dure.manager.autoscaler import Autoscaler
from dure.manager.controller import Controller
from dure.manager.endpoint_api import EndpointApi
from dure.manager.fleet import Fleet, monotonic_ms
from dure.manager.fleet_api import FleetApi
from dure.manager.folder_api import FolderApi
from dure.manager.folders import Folders
from dure.manager.group_api import GroupApi
from dure.manager.hub import Hub
from dure.manager.image_api import ImageApi
from dure.manager.intake import Intake
from dure.manager.keys import SigningKeys
from dure.manager.log_reader import LogReader
from dure.manager.log_relay import LogRelay
from dure.manager.model_api import ModelApi
from dure.manager.observer import Observer
from dure.manager.preset_api import PresetApi
from dure.manager.project_api import ProjectApi
from dure.manager.pulls import Pulls
from dure.manager.registry_api import RegistryApi
from dure.manager.revising import Revising
from dure.manager.routing_api import RoutingApi
from dure.manager.runtime_api import RuntimeApi, store_seed
from dure.manager.scaling_api import ScalingApi
from dure.manager.sealing import Seal
from dure.manager.store import Store, new_uid, now_ms
from dure.manager.token_api import TokenApi
from dure.manager.user_api import UserApi
from dure.manager.validating import Validating
from dure.wire import logs, metrics_server, programs, settings, tokens, tracing
from dure.wire.channel import SERVER_OPTIONS
from dure.wire.errors import DureError

log = logging.getLogger(__name__)

STOP_GRACE_S = 1.0


@dataclass(frozen=True)
class Settings:
    """What `dure manager` was started with. Port 0 means any free one."""

    home: Path
    bind: str
    port: int
    stop_grace_s: float
    metrics_bind: str = "127.0.0.1"
    # 0 shows none.
    metrics_port: int = 0


def _load_recorded(context: click.Context, _parameter: click.Parameter, value: Path) -> Path:
    settings.apply_recorded(context, programs.manager_dir(value) / "settings.toml")
    return value


@click.command(context_settings=settings.CONTEXT_SETTINGS)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    default=settings.default_data_dir,
    show_default="$XDG_DATA_HOME/dure",
    is_eager=True,
    callback=_load_recorded,
    help="Where all state is kept. What was recorded there is taken up again.",
)
@click.option("--bind", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=7070, show_default=True, help="gRPC port.")
@click.option("--insecure", is_flag=True, help="Serve without TLS on an address other than loopback.")
@click.option(
    "--stop-grace-s",
    type=click.FloatRange(0, 3600),
    default=10.0,
    show_default=True,
    help="Time that a session has between SIGTERM and SIGKILL.",
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
@click.option("--log-level", default="info", show_default=True, help="debug, info, warning or error.")
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Log there, not to stderr.")
def main(
    data_dir: Path,
    bind: str,
    port: int,
    insecure: bool,
    stop_grace_s: float,
    metrics_port: int,
    metrics_bind: str,
    log_level: str,
    log_file: Path | None,
) -> None:
    """Runs the manager: the gRPC API, the store, and every decision on what runs where."""
    if not insecure and not _is_loopback(bind):
        raise click.UsageError(
            f"--bind {bind} is not loopback, and the manager does not speak TLS itself: put it behind a TLS "
            "proxy or on a private network, and say --insecure"
        )
    logs.set_up(log_level, log_file)
    home = programs.manager_dir(data_dir)
    recorded = {
        "bind": bind,
        "port": port,
        "insecure": insecure,
        "stop_grace_s": stop_grace_s,
        "metrics_port": metrics_port,
        "metrics_bind": metrics_bind,
    }
    try:
        with programs.running(data_dir, "manager", home):
            settings.write_toml(home / "settings.toml", recorded)
            uvloop.run(run(Settings(home, bind, port, stop_grace_s, metrics_bind, metrics_port)))
    except (DureError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def run(options: Settings) -> None:
    """Until SIGTERM or SIGINT."""
    store = Store(options.home / "dure.db")
    await store.open()
    try:
        folders = Folders(options.home / "folders")
        await _first_start(store, options.home)
        await store_seed(store)
        keys = SigningKeys.load(options.home / "keys", new_uid())
        seal = Seal(options.home / "seal.key")
        fleet = Fleet()
        async with store.read() as session:
            rows = await session.execute(select(schema.Agent.uid, schema.Agent.resource_group))
            fleet.expect([(uid, group) for uid, group in rows])
        # A table of its own for each start of a manager: see hub.
        hub = Hub(table_id=new_uid(), keys=keys.public())
        pulls = Pulls()
        intake = Intake(store, pulls)
        autoscaler = Autoscaler(store, fleet, hub, monotonic_ms)
        measures = autoscaler.measures
        controller = Controller(store, fleet, hub, measures)
        relay = LogRelay(fleet)
        log_reader = LogReader(store, fleet, relay)
        revising = Revising(store, folders)
        validating = Validating(store, fleet, folders, revising, log_reader, pulls)
        await validating.clean_up()
        await controller.build()
        trail = Trail(store)
        gatekeeper = Gatekeeper(store, trail)
        traces = tracing.set_up("manager", f"{options.bind}:{options.port}")
        observer = Observer(traces)
        server = grpc.aio.server(interceptors=[observer, gatekeeper], options=list(SERVER_OPTIONS))
        health_servicer = health.HealthServicer()
        services.register(
            server,
            [
                EndpointApi(store, fleet, revising, validating, log_reader, pulls),
                FolderApi(store, folders),
                ModelApi(store, folders, revising.create),
                TokenApi(store, keys),
                ScalingApi(store, autoscaler),
                AgentApi(store, fleet),
                AdminApi(store, fleet, hub),
                RegistryApi(store, seal),
                ProjectApi(store, gatekeeper, trail),
                UserApi(store, gatekeeper),
                GroupApi(store),
                PresetApi(store),
                ImageApi(store),
                RuntimeApi(store),
                FleetApi(
                    store, fleet, intake, folders, relay, measures, seal, int(options.stop_grace_s * 1000)
                ),
                RoutingApi(store, hub, controller, measures),
                health_servicer,
            ],
        )
        port = _bind(server, options)
        await server.start()
        await health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        log.info("manager listens on %s:%d", options.bind, port)

        async def page() -> str:
            return await exposition.render(store, fleet, hub, controller, observer)

        try:
            async with (
                metrics_server.serving(options.metrics_bind, options.metrics_port, page),
                asyncio.TaskGroup() as group,
            ):
                working = [
                    group.create_task(work)
                    for work in (intake.run(), controller.run(), autoscaler.run(), trail.run())
                ]
                try:
                    await _stop_signal()
                    log.info("manager stops")
                finally:
                    # Who is cancelled within a transaction may leave its connection behind, and SQLite's one
                    # lock with it: what is still to be written would wait for that in vain.
                    async with store.paused():
                        for task in working:
                            task.cancel()
                        await asyncio.wait(working)
        finally:
            await server.stop(STOP_GRACE_S)
            await trail.flush()
            if traces is not None:
                await traces.close()
    finally:
        await store.close()


def _bind(server: grpc.aio.Server, options: Settings) -> int:
    host = f"[{options.bind}]" if ":" in options.bind else options.bind
    try:
        port = server.add_insecure_port(f"{host}:{options.port}")
    except RuntimeError:
        port = 0
    if not port:
        raise OSError(
            f"cannot listen on {host}:{options.port}: the port is taken, or not allowed; stop what holds it, "
            "or choose another with --port"
        )
    return port


async def _stop_signal() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()


async def _first_start(store: Store, home: Path) -> None:
    """The default project, and the admin's key in a file that only the operator can read."""
    async with store.write() as tx:
        if await tx.session.scalar(select(schema.Project.uid).limit(1)) is None:
            tx.session.add(schema.Project(uid=new_uid(), name="default", created_ms=now_ms()))
        if await tx.session.scalar(select(schema.User.uid).limit(1)) is None:
            key, user_uid, now = tokens.new_secret("key"), new_uid(), now_ms()
            settings.write_file(home / "admin.key", f"{key}\n".encode(), 0o600)
            tx.session.add(
                schema.User(
                    uid=user_uid, name="admin", admin=True, disabled=False, description="", created_ms=now
                )
            )
            tx.session.add(
                schema.ApiKey(
                    uid=new_uid(),
                    hash=tokens.hash_secret(key),
                    user_uid=user_uid,
                    label="made at the first start",
                    role="admin",
                    expires_ms=None,
                    created_ms=now,
                )
            )
        if await tx.session.get(schema.ResourceGroup, "default") is None:
            tx.session.add(
                schema.ResourceGroup(
                    name="default",
                    policy="SPREAD",
                    allowed_projects=[],
                    proxy_group="default",
                    description="",
                    created_ms=now_ms(),
                )
            )


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
