"""The manager as a process, called by the library, and by an agent and a proxy made here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from own_ports import free_port

from dure.client import Client
from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.routing.v1 import routing_pb2, routing_pb2_grpc
from dure.v1 import admin_pb2, endpoint_pb2, endpoint_pb2_grpc, folder_pb2, folder_pb2_grpc
from dure.wire import errors
from dure.wire.channel import bearer, open_channel

DEFINITION = """
models:
  - name: m
    model_path: /models
    service: {start_command: [serve, "{port}"], port: 8000}
"""


class Manager:
    """`dure manager` on a folder; can be killed and started again."""

    def __init__(self, data_dir: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> None:
        self.data_dir = data_dir
        self._arguments = arguments
        self._environ = {**os.environ, **(environ or {})}
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-P", "-m", "dure.manager.main", "--data-dir", str(self.data_dir)]
        command += ["--port", str(self.port), "--log-file", str(self.data_dir / "log")]
        self.process = subprocess.Popen([*command, *self._arguments], env=self._environ)

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(15)

    @property
    def key(self) -> str:
        return (self.data_dir / "manager" / "admin.key").read_text().strip()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def client(self) -> Client:
        async with asyncio.timeout(15):
            while not (self.data_dir / "manager" / "admin.key").exists():
                await asyncio.sleep(0.05)
        return Client(self.address, self.key, retry_s=15)


def with_manager(tmp_path: Path, body: Callable[[Manager, Client], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), await manager.client() as client:
            await client.folders.create("m", folder_pb2.FOLDER_USAGE_MODEL)
            await upload(manager, "model-definition.yaml", DEFINITION.encode())
            await body(manager, client)

    manager = Manager(tmp_path)
    manager.start()
    try:
        asyncio.run(run())
    finally:
        assert manager.end() == 0


async def upload(manager: Manager, path: str, content: bytes, **header: Any) -> None:
    """One file, byte for byte as told, also what the library would never send."""

    async def pieces() -> AsyncIterator[folder_pb2.UploadFileRequest]:
        told = {"folder": "projects/default/folders/m", "path": path, "size_bytes": len(content)} | header
        yield folder_pb2.UploadFileRequest(header=folder_pb2.UploadHeader(**told))
        yield folder_pb2.UploadFileRequest(data=content)

    async with raw(manager) as (channel, metadata):
        stub = folder_pb2_grpc.FolderServiceStub(channel)
        try:
            await stub.UploadFile(pieces(), metadata=metadata, timeout=10)
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc(error) from error


@contextlib.asynccontextmanager
async def raw(manager: Manager) -> AsyncIterator[tuple[grpc.aio.Channel, Any]]:
    async with open_channel(manager.address) as channel:
        yield channel, bearer(manager.key)


async def refusal(channel: grpc.aio.Channel, path: str, metadata: Any) -> str:
    """The status that a call without a message of sense ends with."""
    while True:
        call = channel.stream_stream(path)(iter([b""]), metadata=metadata, timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
        # gRPC's client stumbles over an end that comes before it has sent: that is no answer.
        if "execute_batch" not in str(caught.value.debug_error_string()):
            return caught.value.code().name


def test_every_method_needs_a_key(tmp_path: Path) -> None:
    async def body(manager: Manager, client: Client) -> None:
        async with open_channel(manager.address) as channel:
            for service in (endpoint_pb2, folder_pb2, admin_pb2, fleet_pb2, routing_pb2):
                for descriptor in service.DESCRIPTOR.services_by_name.values():
                    for method in descriptor.methods:
                        for metadata in ((), bearer("dure_key_wrong")):
                            path = f"/{descriptor.full_name}/{method.name}"
                            assert await refusal(channel, path, metadata) == "UNAUTHENTICATED", path

    with_manager(tmp_path, body)


def test_files_stay_in_their_folder_and_are_whole(tmp_path: Path) -> None:
    async def body(manager: Manager, client: Client) -> None:
        for path in (
            "../out",
            "/etc/out",
            "a/../../out",
            "",
            "a//b",
            "./a",
            "a\nb",
            "x" * 2000,
            "a/" * 40 + "b",
        ):
            with pytest.raises(errors.InvalidInput):
                await upload(manager, path, b"x")
        with pytest.raises(errors.InvalidInput, match="bytes were announced"):
            await upload(manager, "short", b"abc", size_bytes=4)
        with pytest.raises(errors.InvalidInput, match="bytes were announced"):
            await upload(manager, "long", b"abc", size_bytes=2)
        with pytest.raises(errors.InvalidInput, match="differs"):
            await upload(manager, "hash", b"abc", sha256="0" * 64)
        folder = await client.folders.get("m")
        root = manager.data_dir / "manager" / "folders" / folder.uid
        (root / "link").symlink_to("/etc")
        (root / "passwd").symlink_to("/etc/passwd")
        with pytest.raises(errors.InvalidInput, match="links are not followed"):
            await upload(manager, "link/out", b"x")
        async with raw(manager) as (channel, metadata):
            stub = folder_pb2_grpc.FolderServiceStub(channel)
            request = folder_pb2.DownloadFileRequest(folder=folder.name, path="passwd")
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in stub.DownloadFile(request, metadata=metadata, timeout=10):
                    pass
        assert [file.path async for file in client.folders.ls("m")] == ["model-definition.yaml"]
        assert not os.path.exists("/etc/out")
        await upload(manager, "deep/er/file", b"content")
        assert (root / "deep/er/file").read_bytes() == b"content"

    with_manager(tmp_path, body)


def test_etags_masks_request_ids_and_pages(tmp_path: Path) -> None:
    async def body(manager: Manager, client: Client) -> None:
        async with raw(manager) as (channel, metadata):
            stub = endpoint_pb2_grpc.EndpointServiceStub(channel)

            async def create(name: str, request_id: str = "") -> endpoint_pb2.Endpoint:
                request = endpoint_pb2.CreateEndpointRequest(
                    parent="projects/default",
                    endpoint_id=name,
                    request_id=request_id,
                    endpoint=endpoint_pb2.Endpoint(model="m", runtime="custom", replica_count=0),
                )
                return (await stub.CreateEndpoint(request, metadata=metadata, timeout=10)).endpoint

            first = await create("e1", "once")
            assert (await create("e1", "once")).uid == first.uid
            for number in range(2, 6):
                await create(f"e{number}")
            found, token = [], ""
            for _ in range(3):
                page = await stub.ListEndpoints(
                    endpoint_pb2.ListEndpointsRequest(
                        parent="projects/default", page_size=2, page_token=token
                    ),
                    metadata=metadata,
                    timeout=10,
                )
                found += [endpoint.name.rsplit("/")[-1] for endpoint in page.endpoints]
                token = page.next_page_token
            assert (found, token) == (["e1", "e2", "e3", "e4", "e5"], "")

            async def update(etag: str, *paths: str) -> endpoint_pb2.Endpoint:
                request = endpoint_pb2.UpdateEndpointRequest(
                    endpoint=endpoint_pb2.Endpoint(name=first.name, etag=etag, open_to_public=True)
                )
                request.update_mask.paths.extend(paths)
                try:
                    return (await stub.UpdateEndpoint(request, metadata=metadata, timeout=10)).endpoint
                except grpc.aio.AioRpcError as error:
                    raise errors.from_rpc(error) from error

            changed = await update(first.etag, "open_to_public")
            assert changed.open_to_public
            assert changed.etag != first.etag
            with pytest.raises(errors.Conflict):
                await update(first.etag, "open_to_public")
            with pytest.raises(errors.InvalidInput, match="is required"):
                await update("")
            with pytest.raises(errors.InvalidInput, match="cannot be changed"):
                await update("", "model", "open_to_public")
            for bad in ("", "xyz", "projects/default"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.GetEndpoint(
                        endpoint_pb2.GetEndpointRequest(name=bad), metadata=metadata, timeout=10
                    )
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    with_manager(tmp_path, body)


def test_watches_resume_and_the_store_survives_sigkill(tmp_path: Path) -> None:
    async def body(manager: Manager, client: Client) -> None:
        await client.endpoints.create("one", model="m", replicas=0)
        async with raw(manager) as (channel, metadata):
            stub = endpoint_pb2_grpc.EndpointServiceStub(channel)

            def watch(after: int) -> Any:
                request = endpoint_pb2.WatchEndpointsRequest(name="projects/default", resume_after=after)
                return stub.WatchEndpoints(request, metadata=metadata, timeout=20)

            snapshot = watch(0)
            first = await snapshot.read()
            assert first.synced
            assert [endpoint.name for endpoint in first.endpoints] == ["projects/default/endpoints/one"]
            snapshot.cancel()

            assert manager.end(signal.SIGKILL) == -signal.SIGKILL
            manager.start()
            await client.endpoints.create("two", model="m", replicas=0)
            await client.endpoints.delete("one")
            await client.endpoints.wait_gone("one", timeout_s=10)
            resumed = watch(first.revision_number)
            changed, removed = set(), set()
            while not (changed and removed):
                batch = await resumed.read()
                changed |= {endpoint.name for endpoint in batch.endpoints}
                removed |= set(batch.removed)
            assert changed == {"projects/default/endpoints/two"}
            assert removed == {"projects/default/endpoints/one"}
            resumed.cancel()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await watch(10_000_000).read()
            assert isinstance(errors.from_rpc(caught.value), errors.Compacted)

        second = subprocess.run(
            [sys.executable, "-m", "dure.manager.main", "--data-dir", str(tmp_path), "--port", "0"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        assert second.returncode == 1
        assert "another process already runs manager" in second.stderr
        assert "Traceback" not in second.stderr

    with_manager(tmp_path, body)


@contextlib.asynccontextmanager
async def following_proxy(manager: Manager, client: Client) -> AsyncIterator[list[routing_pb2.Route]]:
    """A proxy that takes up every route and has no request left on any draining target."""
    token = await client.admin.create_join_token(admin_pb2.JOIN_ROLE_PROXY)
    seen: list[routing_pb2.Route] = []

    async with open_channel(manager.address) as channel:
        stub = routing_pb2_grpc.RoutingServiceStub(channel)
        joined = await stub.Join(routing_pb2.JoinRequest(proxy="p"), metadata=bearer(token.token), timeout=10)
        stream = stub.Connect(metadata=bearer(joined.credential))
        hello = routing_pb2.Hello(protocol_version=1, public_host="h", unavailable_ports=[9000])
        hello.port_pool.first, hello.port_pool.last = 9000, 9003
        await stream.write(routing_pb2.ConnectRequest(hello=hello))

        async def follow() -> None:
            while True:
                message = await stream.read()
                if message.HasField("update") and message.update.complete:
                    seen.extend(message.update.routes)
                    report = routing_pb2.Report(applied_revision_number=message.update.revision_number)
                    for route in message.update.routes:
                        report.drained.extend(t.replica_uid for t in route.targets if t.draining)
                    await stream.write(routing_pb2.ConnectRequest(report=report))

        task = asyncio.create_task(follow())
        try:
            yield seen
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            stream.cancel()


def test_an_agent_gets_its_kernels_folder_and_word(tmp_path: Path) -> None:
    async def body(manager: Manager, client: Client) -> None:
        token = await client.admin.create_join_token(admin_pb2.JOIN_ROLE_AGENT)
        async with open_channel(manager.address) as channel, following_proxy(manager, client) as routes:
            stub = fleet_pb2_grpc.FleetServiceStub(channel)
            routing = routing_pb2_grpc.RoutingServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await routing.Join(
                    routing_pb2.JoinRequest(proxy="p"), metadata=bearer(token.token), timeout=10
                )
            assert "for agents, not for proxys" in (caught.value.details() or "")
            joined = await stub.Join(
                fleet_pb2.JoinRequest(agent="a"), metadata=bearer(token.token), timeout=10
            )
            mine = bearer(joined.credential)
            stream = stub.Connect(metadata=mine)
            hello = fleet_pb2.Hello(
                protocol_version=1, backend="test", slots={"cpu": 4000, "mem": 2**33 * 1000}, maps_mounts=True
            )
            hello.devices.add(id="gpu0", healthy=True, slots={"cuda.shares": 1000, "cuda.device": 1000})
            await stream.write(fleet_pb2.ConnectRequest(hello=hello))
            assert (await stream.read()).welcome.agent_uid == joined.uid
            await stream.write(fleet_pb2.ConnectRequest(observed=fleet_pb2.Observed(complete=True)))
            snapshot = (await stream.read()).desired
            assert (snapshot.snapshot, snapshot.complete, len(snapshot.kernels)) == (True, True, 0)

            slots = {"cpu": "1", "mem": "1g", "cuda.shares": "0.5"}
            await client.endpoints.create("e", model="m", replicas=1, resource_slots=slots)
            (spec,) = (await stream.read()).desired.kernels
            assert (spec.endpoint, spec.port, spec.fixed_port) == ("e", 8000, False)
            assert [(d.device, d.slot, d.amount) for d in spec.devices] == [("gpu0", "cuda.shares", 500)]
            assert dict(spec.slots) == {"cpu": 1000, "mem": 2**30 * 1000}

            files = [
                file.path
                async for piece in stub.GetFolderManifest(
                    fleet_pb2.GetFolderManifestRequest(folder_uid=spec.model.folder_uid),
                    metadata=mine,
                    timeout=10,
                )
                for file in piece.files
            ]
            assert files == ["model-definition.yaml"]
            content = b""
            request = fleet_pb2.FetchFileRequest(folder_uid=spec.model.folder_uid, path=files[0], offset=3)
            async for piece in stub.FetchFile(request, metadata=mine, timeout=10):
                content += piece.data
            assert content == DEFINITION.encode()[3:]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for _ in stub.GetFolderManifest(
                    fleet_pb2.GetFolderManifestRequest(folder_uid="other"), metadata=mine, timeout=10
                ):
                    pass
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED

            status = fleet_pb2.KernelStatus(
                uid=spec.uid,
                generation=spec.generation,
                phase=fleet_pb2.KERNEL_PHASE_RUNNING,
                health=fleet_pb2.KERNEL_HEALTH_HEALTHY,
                host="127.0.0.1",
                port=21234,
                pid=77,
            )
            await stream.write(fleet_pb2.ConnectRequest(observed=fleet_pb2.Observed(kernels=[status])))
            endpoint = await client.endpoints.wait("e", timeout_s=10)
            assert (endpoint.replicas[0].target, endpoint.replicas[0].pid) == ("127.0.0.1:21234", 77)
            assert endpoint.address == "http://h:9001", "port 9000 is held by another program"
            assert [target.port for target in routes[-1].targets] == [21234], "HEALTHY: the proxy has it"

            await client.endpoints.update("e", replicas=0)
            removal: Any = None
            async with asyncio.timeout(10):
                while removal is None:
                    message = await stream.read()
                    removal = next(iter(message.desired.removals), None)
            assert removal.uid == spec.uid
            assert removal.generation > spec.generation
            status.phase = fleet_pb2.KERNEL_PHASE_GONE
            await stream.write(fleet_pb2.ConnectRequest(observed=fleet_pb2.Observed(kernels=[status])))
            async with asyncio.timeout(10):
                while (await client.agents.get("a")).session_count:
                    await asyncio.sleep(0.1)
            stream.cancel()

    with_manager(tmp_path, body)
