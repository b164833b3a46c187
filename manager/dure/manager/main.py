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
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection
from sqlalchemy import select

from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.manager import schema
from dure.manager.admin_api import AdminApi
from dure.manager.agent_api import AgentApi
from dure.manager.audit import Trail
from dure.manager.auth import Gatekeeper
from dure.manager.controller import Controller
from dure.manager.endpoint_api import EndpointApi
from dure.manager.fleet import Fleet
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
from dure.manager.preset_api import PresetApi
from dure.manager.project_api import ProjectApi
from dure.manager.revising import Revising
from dure.manager.routing_api import RoutingApi
from dure.manager.runtime_api import RuntimeApi, store_seed
from dure.manager.store import Store, new_uid, now_ms
from dure.manager.token_api import TokenApi
from dure.manager.user_api import UserApi
from dure.manager.validating import Validating
from dure.routing.v1 import routing_pb2, routing_pb2_grpc
from dure.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    agent_pb2,
    agent_pb2_grpc,
    catalog_pb2,
    catalog_pb2_grpc,
    endpoint_pb2,
    endpoint_pb2_grpc,
    folder_pb2,
    folder_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    project_pb2,
    project_pb2_grpc,
    token_pb2,
    token_pb2_grpc,
)
from dure.wire import logs, programs, settings, tokens
from dure.wire.channel import SERVER_OPTIONS
from dure.wire.errors import DureError

log = logging.getLogger(__name__)

STOP_GRACE_S = 1.0
_DESCRIPTORS = (
    admin_pb2,
    agent_pb2,
    catalog_pb2,
    endpoint_pb2,
    folder_pb2,
    model_pb2,
    project_pb2,
    token_pb2,
    fleet_pb2,
    routing_pb2,
    health_pb2,
)


@dataclass(frozen=True)
class Settings:
    """What `dure manager` was started with. Port 0 means any free one."""

    home: Path
    bind: str
    port: int
    stop_grace_s: float


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
@click.option("--log-level", default="info", show_default=True, help="debug, info, warning or error.")
@click.option("--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Log there, not to stderr.")
def main(
    data_dir: Path,
    bind: str,
    port: int,
    insecure: bool,
    stop_grace_s: float,
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
    recorded = {"bind": bind, "port": port, "insecure": insecure, "stop_grace_s": stop_grace_s}
    try:
        with programs.running(data_dir, "manager", home):
            settings.write_toml(home / "settings.toml", recorded)
            uvloop.run(run(Settings(home, bind, port, stop_grace_s)))
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
        fleet = Fleet()
        async with store.read() as session:
            rows = await session.execute(select(schema.Agent.uid, schema.Agent.resource_group))
            fleet.expect([(uid, group) for uid, group in rows])
        # A table of its own for each start of a manager: see hub.
        hub = Hub(table_id=new_uid(), keys=keys.public())
        intake = Intake(store)
        controller = Controller(store, fleet, hub)
        relay = LogRelay(fleet)
        log_reader = LogReader(store, fleet, relay)
        revising = Revising(store, folders)
        validating = Validating(store, fleet, folders, revising, log_reader)
        await validating.clean_up()
        await controller.build()
        trail = Trail(store)
        gatekeeper = Gatekeeper(store, trail)
        server = grpc.aio.server(interceptors=[gatekeeper], options=list(SERVER_OPTIONS))
        health_servicer = health.HealthServicer()
        endpoint_api = EndpointApi(store, fleet, revising, validating, log_reader)
        endpoint_pb2_grpc.add_EndpointServiceServicer_to_server(endpoint_api, server)
        folder_pb2_grpc.add_FolderServiceServicer_to_server(FolderApi(store, folders), server)
        token_pb2_grpc.add_TokenServiceServicer_to_server(TokenApi(store, keys), server)
        agent_pb2_grpc.add_AgentServiceServicer_to_server(AgentApi(store, fleet), server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminApi(store, fleet, hub), server)
        project_pb2_grpc.add_ProjectServiceServicer_to_server(ProjectApi(store, gatekeeper, trail), server)
        project_pb2_grpc.add_UserServiceServicer_to_server(UserApi(store, gatekeeper), server)
        catalog_pb2_grpc.add_ResourceGroupServiceServicer_to_server(GroupApi(store), server)
        catalog_pb2_grpc.add_PresetServiceServicer_to_server(PresetApi(store), server)
        catalog_pb2_grpc.add_ImageServiceServicer_to_server(ImageApi(store), server)
        catalog_pb2_grpc.add_RuntimeServiceServicer_to_server(RuntimeApi(store), server)
        model_api = ModelApi(store, folders, endpoint_api.create)
        model_pb2_grpc.add_ModelServiceServicer_to_server(model_api, server)
        stop_grace_ms = int(options.stop_grace_s * 1000)
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(
            FleetApi(store, fleet, intake, folders, relay, stop_grace_ms), server
        )
        routing_pb2_grpc.add_RoutingServiceServicer_to_server(RoutingApi(store, hub, controller), server)
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        reflection.enable_server_reflection(_service_names(), server)
        port = _bind(server, options)
        await server.start()
        await health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        log.info("manager listens on %s:%d", options.bind, port)
        try:
            async with asyncio.TaskGroup() as group:
                working = [
                    group.create_task(work) for work in (intake.run(), controller.run(), trail.run())
                ]
                await _stop_signal()
                log.info("manager stops")
                for task in working:
                    task.cancel()
        finally:
            await server.stop(STOP_GRACE_S)
            await trail.flush()
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


def _service_names() -> list[str]:
    found = [
        service.full_name
        for module in _DESCRIPTORS
        for service in module.DESCRIPTOR.services_by_name.values()
    ]
    return [*found, reflection.SERVICE_NAME]


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
