"""A manager that keeps everything in memory and does as it is told: real gRPC on a port of its own."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
from grpc_status import rpc_status

from dure.client.context import Context, save_context
from dure.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    agent_pb2,
    agent_pb2_grpc,
    endpoint_pb2,
    endpoint_pb2_grpc,
    folder_pb2,
    folder_pb2_grpc,
    token_pb2,
    token_pb2_grpc,
)
from dure.wire import names
from dure.wire.channel import PIECE_BYTES, SERVER_OPTIONS
from dure.wire.errors import (
    AlreadyExists,
    Compacted,
    Conflict,
    DureError,
    FailedPrecondition,
    InvalidInput,
    NotFound,
    Unauthenticated,
    Violation,
    to_status,
)
from dure.wire.quantities import parse_slots

KEY = "dure_key_of_the_fake_manager"
Answer = TypeVar("Answer")
STEP_S = 5.0


def refuses(method: Callable[..., Awaitable[Answer]]) -> Callable[..., Awaitable[Answer]]:
    """Turns our errors into gRPC's, and checks the key, as the manager does."""

    @functools.wraps(method)
    async def checked(self: Any, request: Any, context: Any) -> Answer:
        try:
            self.fake.authenticate(context)
            return await method(self, request, context)
        except DureError as error:
            await context.abort_with_status(rpc_status.to_status(to_status(error)))
            raise AssertionError("abort raises") from error

    return checked


class FakeManager:
    """State, and handles that tests pull. Revisions count changes; `kept` is the oldest to resume from."""

    def __init__(self) -> None:
        self.endpoints: dict[str, endpoint_pb2.Endpoint] = {}
        self.events: dict[str, list[endpoint_pb2.Event]] = {}
        self.ended: dict[str, list[endpoint_pb2.Replica]] = {}
        self.requests: dict[str, str] = {}
        self.folders: dict[str, folder_pb2.Folder] = {}
        self.files: dict[str, dict[str, tuple[folder_pb2.File, bytes]]] = {}
        self.tokens: dict[str, token_pb2.Token] = {}
        self.agents: list[agent_pb2.Agent] = []
        self.cluster = admin_pb2.GetClusterResponse(version="0.1.0", route_revision_number=7)
        self.join_requests: list[admin_pb2.CreateJoinTokenRequest] = []
        self.log: list[tuple[int, str]] = []
        self.revision = 0
        self.kept = 0
        self.page_size_max = 1000
        self.calls: list[str] = []
        self.unavailable: list[str] = []  # methods whose next call is answered with UNAVAILABLE
        self.break_download_after: int | None = None
        self.watches: set[asyncio.Task[Any]] = set()
        self._changed = asyncio.Event()
        self._uids = itertools.count(1)
        self.address = ""
        self.context = Context("", "")

    def authenticate(self, context: Any) -> None:
        if dict(context.invocation_metadata()).get("authorization") != f"Bearer {KEY}":
            raise Unauthenticated("the API key is not known")

    def called(self, method: str) -> None:
        self.calls.append(method)
        if method in self.unavailable:
            self.unavailable.remove(method)
            raise _Unavailable("try again")

    def uid(self) -> str:
        return f"01990000-0000-7000-8000-{next(self._uids):012x}"

    def touch(self, name: str) -> None:
        """Logs a change and wakes the watches."""
        self.revision += 1
        self.log.append((self.revision, name))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def change(self) -> None:
        await self._changed.wait()

    def set(self, endpoint_id: str, status: str, *, ready: int | None = None, reason: str = "") -> None:
        """Moves an endpoint; HEALTHY and STOPPED get the replicas that belong to them."""
        endpoint = self.endpoints[names.endpoint("default", endpoint_id)]
        endpoint.status = endpoint_pb2.EndpointStatus.Value(f"ENDPOINT_STATUS_{status}")
        endpoint.status_reason = reason
        endpoint.ready_replicas = endpoint.desired_replicas if ready is None else ready
        del endpoint.replicas[:]
        for number in range(endpoint.desired_replicas):
            healthy = number < endpoint.ready_replicas
            uid = f"01990000-0000-7000-8000-0000000000{number:02x}"
            endpoint.replicas.add(
                name=f"{endpoint.name}/replicas/{uid}",
                uid=uid,
                revision=1,
                status=endpoint_pb2.REPLICA_STATUS_HEALTHY
                if healthy
                else endpoint_pb2.REPLICA_STATUS_DEGRADED,
                health=endpoint_pb2.HEALTH_HEALTHY if healthy else endpoint_pb2.HEALTH_DEGRADED,
                node="agents/agent-1",
                devices=[endpoint_pb2.DeviceShare(device="SIM-0", slot="cuda.shares", amount="0.25")],
                target=f"127.0.0.1:{20000 + number}",
                pid=1000 + number,
                probe=endpoint_pb2.Probe(
                    status_code=200 if healthy else 503,
                    consecutive_failures=0 if healthy else 2,
                    detail="" if healthy else "status 503, expected 200",
                ),
            )
        self.touch(endpoint.name)

    def remove(self, endpoint_id: str) -> None:
        name = names.endpoint("default", endpoint_id)
        del self.endpoints[name]
        self.touch(name)

    def compact(self) -> None:
        """Forgets what happened: no watch can resume from before."""
        self.kept = self.revision + 1
        self.revision += 1

    async def drop_watches(self) -> None:
        """Breaks every watch as a dying manager does."""
        for watch in [*self.watches]:
            watch.cancel()
        await until(lambda: not self.watches)


class _Unavailable(DureError):
    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "MANAGER_UNREACHABLE"


class Endpoints(endpoint_pb2_grpc.EndpointServiceServicer):
    def __init__(self, fake: FakeManager) -> None:
        self.fake = fake

    def find(self, name: str) -> endpoint_pb2.Endpoint:
        _, endpoint_id = names.parse(name, "projects/{}/endpoints/{}")
        if name not in self.fake.endpoints:
            raise NotFound(f"there is no endpoint `{endpoint_id}`")
        return self.fake.endpoints[name]

    @refuses
    async def CreateEndpoint(self, request: Any, context: Any) -> endpoint_pb2.CreateEndpointResponse:
        fake = self.fake
        if request.request_id in fake.requests:
            stored = fake.endpoints[fake.requests[request.request_id]]
            fake.called("CreateEndpoint")
            return endpoint_pb2.CreateEndpointResponse(endpoint=stored)
        violations = []
        problem = names.check_id(request.endpoint_id, names.ENDPOINT_ID, "endpoint_id")
        if problem:
            violations.append(problem)
        try:
            parse_slots(request.endpoint.resource_slots, "endpoint.resource_slots")
        except InvalidInput as error:
            violations += error.violations
        if violations:
            raise InvalidInput.of(violations)
        if f"{request.parent}/folders/{request.endpoint.model}" not in fake.folders:
            raise NotFound(f"there is no folder `{request.endpoint.model}`")
        name = f"{request.parent}/endpoints/{request.endpoint_id}"
        if name in fake.endpoints:
            raise AlreadyExists(f"an endpoint `{request.endpoint_id}` exists already")
        endpoint = endpoint_pb2.Endpoint()
        endpoint.CopyFrom(request.endpoint)
        endpoint.name, endpoint.uid, endpoint.etag, endpoint.revision = name, fake.uid(), "1", 1
        endpoint.create_time.GetCurrentTime()
        endpoint.model = f"{request.parent}/folders/{request.endpoint.model}"
        endpoint.status = endpoint_pb2.ENDPOINT_STATUS_PENDING
        endpoint.status_reason = "waiting for a place"
        endpoint.address = "http://127.0.0.1:7100"
        endpoint.desired_replicas = endpoint.replica_count
        fake.endpoints[name] = endpoint
        fake.requests[request.request_id] = name
        fake.touch(name)
        # The answer is lost on the way when told so: what was stored stays.
        fake.called("CreateEndpoint")
        return endpoint_pb2.CreateEndpointResponse(endpoint=endpoint)

    @refuses
    async def GetEndpoint(self, request: Any, context: Any) -> endpoint_pb2.GetEndpointResponse:
        self.fake.called("GetEndpoint")
        return endpoint_pb2.GetEndpointResponse(endpoint=self.find(request.name))

    @refuses
    async def ListEndpoints(self, request: Any, context: Any) -> endpoint_pb2.ListEndpointsResponse:
        self.fake.called("ListEndpoints")
        items, token = page([self.fake.endpoints[n] for n in sorted(self.fake.endpoints)], request, self.fake)
        return endpoint_pb2.ListEndpointsResponse(endpoints=items, next_page_token=token)

    @refuses
    async def UpdateEndpoint(self, request: Any, context: Any) -> endpoint_pb2.UpdateEndpointResponse:
        self.fake.called("UpdateEndpoint")
        endpoint = self.find(request.endpoint.name)
        if request.endpoint.etag and request.endpoint.etag != endpoint.etag:
            raise Conflict("the endpoint was changed meanwhile")
        for path in request.update_mask.paths:
            setattr(endpoint, path, getattr(request.endpoint, path))
        endpoint.desired_replicas = endpoint.replica_count
        endpoint.etag = str(int(endpoint.etag) + 1)
        self.fake.touch(endpoint.name)
        return endpoint_pb2.UpdateEndpointResponse(endpoint=endpoint)

    @refuses
    async def DeleteEndpoint(self, request: Any, context: Any) -> endpoint_pb2.DeleteEndpointResponse:
        self.fake.called("DeleteEndpoint")
        endpoint = self.find(request.name)
        endpoint.status = endpoint_pb2.ENDPOINT_STATUS_TERMINATING
        self.fake.touch(endpoint.name)
        return endpoint_pb2.DeleteEndpointResponse(endpoint=endpoint)

    @refuses
    async def RetryEndpoint(self, request: Any, context: Any) -> endpoint_pb2.RetryEndpointResponse:
        self.fake.called("RetryEndpoint")
        endpoint = self.find(request.name)
        del endpoint.errors[:]
        endpoint.status = endpoint_pb2.ENDPOINT_STATUS_PENDING
        self.fake.touch(endpoint.name)
        return endpoint_pb2.RetryEndpointResponse(endpoint=endpoint)

    @refuses
    async def ListReplicas(self, request: Any, context: Any) -> endpoint_pb2.ListReplicasResponse:
        endpoint = self.find(request.parent)
        ended = self.fake.ended.get(endpoint.name, []) if request.show_ended else []
        items, token = page([*ended, *endpoint.replicas], request, self.fake)
        return endpoint_pb2.ListReplicasResponse(replicas=items, next_page_token=token)

    @refuses
    async def ListEvents(self, request: Any, context: Any) -> endpoint_pb2.ListEventsResponse:
        items, token = page(self.fake.events.get(self.find(request.parent).name, []), request, self.fake)
        return endpoint_pb2.ListEventsResponse(events=items, next_page_token=token)

    async def WatchEndpoints(self, request: Any, context: Any) -> AsyncIterator[Any]:
        fake = self.fake
        task = asyncio.current_task()
        assert task is not None
        fake.calls.append(f"WatchEndpoints {request.resume_after}")
        fake.watches.add(task)
        try:
            fake.authenticate(context)
            if request.name.count("/") > 1 and not request.resume_after:
                self.find(request.name)
            if request.resume_after and request.resume_after < fake.kept:
                raise Compacted("that revision is no longer kept")
            if request.resume_after:
                seen = request.resume_after
            else:
                seen = fake.revision
                chosen = [e for n, e in sorted(fake.endpoints.items()) if self._meant(request.name, n)]
                # In pieces, as a large snapshot comes.
                for endpoint in chosen[:-1]:
                    yield self._batch(request.name, seen, [endpoint.name], synced=False)
                yield self._batch(request.name, seen, [e.name for e in chosen[-1:]], synced=True)
            while True:
                news = {
                    name for revision, name in fake.log if revision > seen and self._meant(request.name, name)
                }
                if news:
                    seen = fake.revision
                    yield self._batch(request.name, seen, sorted(news), synced=True)
                else:
                    await fake.change()
        except DureError as error:
            await context.abort_with_status(rpc_status.to_status(to_status(error)))
        except asyncio.CancelledError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "going away")
        finally:
            fake.watches.discard(task)

    def _meant(self, target: str, name: str) -> bool:
        return name == target or (target.count("/") == 1 and name.startswith(f"{target}/"))

    def _batch(self, target: str, revision: int, changed: list[str], *, synced: bool) -> Any:
        batch = endpoint_pb2.WatchEndpointsResponse(revision_number=revision, synced=synced)
        for name in changed:
            if name in self.fake.endpoints:
                batch.endpoints.add().CopyFrom(self.fake.endpoints[name])
                if target.count("/") == 1:
                    del batch.endpoints[-1].replicas[:]
            else:
                batch.removed.append(name)
        return batch


class Folders(folder_pb2_grpc.FolderServiceServicer):
    def __init__(self, fake: FakeManager) -> None:
        self.fake = fake

    def find(self, name: str) -> folder_pb2.Folder:
        if name not in self.fake.folders:
            raise NotFound(f"there is no folder `{name.rsplit('/', 1)[-1]}`")
        folder = self.fake.folders[name]
        folder.file_count = len(self.fake.files[name])
        folder.size_bytes = sum(len(content) for _, content in self.fake.files[name].values())
        return folder

    @refuses
    async def CreateFolder(self, request: Any, context: Any) -> folder_pb2.CreateFolderResponse:
        self.fake.called("CreateFolder")
        name = f"{request.parent}/folders/{request.folder_id}"
        if name in self.fake.folders:
            raise AlreadyExists(f"a folder `{request.folder_id}` exists already")
        folder = folder_pb2.Folder(name=name, uid=self.fake.uid(), usage=request.folder.usage)
        folder.create_time.GetCurrentTime()
        self.fake.folders[name], self.fake.files[name] = folder, {}
        return folder_pb2.CreateFolderResponse(folder=folder)

    @refuses
    async def GetFolder(self, request: Any, context: Any) -> folder_pb2.GetFolderResponse:
        return folder_pb2.GetFolderResponse(folder=self.find(request.name))

    @refuses
    async def ListFolders(self, request: Any, context: Any) -> folder_pb2.ListFoldersResponse:
        items, token = page([self.find(name) for name in sorted(self.fake.folders)], request, self.fake)
        return folder_pb2.ListFoldersResponse(folders=items, next_page_token=token)

    @refuses
    async def DeleteFolder(self, request: Any, context: Any) -> folder_pb2.DeleteFolderResponse:
        self.find(request.name)
        users = [e.name.rsplit("/", 1)[-1] for e in self.fake.endpoints.values() if e.model == request.name]
        if users:
            raise FailedPrecondition(f"the folder is used by endpoint {users[0]}: delete that first")
        del self.fake.folders[request.name], self.fake.files[request.name]
        return folder_pb2.DeleteFolderResponse()

    @refuses
    async def ListFiles(self, request: Any, context: Any) -> folder_pb2.ListFilesResponse:
        self.find(request.parent)
        stored = self.fake.files[request.parent]
        items, token = page([stored[path][0] for path in sorted(stored)], request, self.fake)
        return folder_pb2.ListFilesResponse(files=items, next_page_token=token)

    async def UploadFile(self, request_iterator: Any, context: Any) -> folder_pb2.UploadFileResponse:
        try:
            self.fake.authenticate(context)
            first = await anext(aiter(request_iterator))
            header = first.header
            self.find(header.folder)
            content = bytearray()
            async for piece in request_iterator:
                content += piece.data
                self.fake.called("UploadPiece")
            if len(content) != header.size_bytes:
                raise InvalidInput(
                    f"{header.path}: {len(content)} bytes came, {header.size_bytes} were announced"
                )
            if header.sha256 and hashlib.sha256(content).hexdigest() != header.sha256:
                raise InvalidInput(f"{header.path}: the SHA-256 differs")
            file = folder_pb2.File(path=header.path, size_bytes=len(content), mode=header.mode or 0o644)
            file.update_time.GetCurrentTime()
            self.fake.files[header.folder][header.path] = file, bytes(content)
            return folder_pb2.UploadFileResponse(file=file)
        except DureError as error:
            await context.abort_with_status(rpc_status.to_status(to_status(error)))
            raise

    async def DownloadFile(self, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            self.fake.authenticate(context)
            self.find(request.folder)
            file, content = self.fake.files[request.folder][request.path]
            yield folder_pb2.DownloadFileResponse(file=file)
            for start in range(request.offset, len(content), PIECE_BYTES):
                yield folder_pb2.DownloadFileResponse(data=content[start : start + PIECE_BYTES])
                if self.fake.break_download_after is not None and start >= self.fake.break_download_after:
                    self.fake.break_download_after = None
                    raise _Unavailable("going away")
        except DureError as error:
            await context.abort_with_status(rpc_status.to_status(to_status(error)))

    @refuses
    async def DeleteFile(self, request: Any, context: Any) -> folder_pb2.DeleteFileResponse:
        stored = self.fake.files[self.find(request.folder).name]
        below = [path for path in stored if path.startswith(f"{request.path}/")]
        if below and not request.recursive:
            raise FailedPrecondition(f"`{request.path}` is a sub-folder with files in it: remove it with -r")
        if request.path not in stored and not below:
            raise NotFound(f"there is no file `{request.path}`")
        for path in [*below, request.path]:
            stored.pop(path, None)
        return folder_pb2.DeleteFileResponse()


class Tokens(token_pb2_grpc.TokenServiceServicer):
    def __init__(self, fake: FakeManager) -> None:
        self.fake = fake

    def _find(self, name: str) -> token_pb2.Token:
        if name not in self.fake.tokens:
            raise NotFound(f"there is no token `{name.rsplit('/', 1)[-1]}`")
        return self.fake.tokens[name]

    @refuses
    async def CreateToken(self, request: Any, context: Any) -> token_pb2.CreateTokenResponse:
        self.fake.called("CreateToken")
        if request.parent not in self.fake.endpoints:
            raise NotFound(f"there is no endpoint `{request.parent.rsplit('/', 1)[-1]}`")
        if request.WhichOneof("expiry") == "ttl" and request.ttl.ToSeconds() <= 0:
            raise InvalidInput.of([Violation("ttl", "must be more than zero")])
        uid = self.fake.uid()
        token = token_pb2.Token(
            name=f"{request.parent}/tokens/{uid}",
            uid=uid,
            label=request.label,
            status=token_pb2.TOKEN_STATUS_ACTIVE,
            secret=f"secret-of-{uid}",
        )
        token.create_time.GetCurrentTime()
        if request.WhichOneof("expiry") == "ttl":
            token.expire_time.FromSeconds(token.create_time.seconds + request.ttl.seconds)
        else:
            token.expire_time.CopyFrom(request.expire_time)
        self.fake.tokens[token.name] = token
        return token_pb2.CreateTokenResponse(token=token)

    @refuses
    async def GetToken(self, request: Any, context: Any) -> token_pb2.GetTokenResponse:
        return token_pb2.GetTokenResponse(token=self._find(request.name))

    @refuses
    async def ListTokens(self, request: Any, context: Any) -> token_pb2.ListTokensResponse:
        found = []
        for token in reversed(self.fake.tokens.values()):
            shown = token_pb2.Token()
            shown.CopyFrom(token)
            shown.secret = ""
            found.append(shown)
        items, next_token = page(found, request, self.fake)
        return token_pb2.ListTokensResponse(tokens=items, next_page_token=next_token)

    @refuses
    async def RevokeToken(self, request: Any, context: Any) -> token_pb2.RevokeTokenResponse:
        token = self._find(request.name)
        token.status = token_pb2.TOKEN_STATUS_REVOKED
        return token_pb2.RevokeTokenResponse(token=token)


class Agents(agent_pb2_grpc.AgentServiceServicer):
    def __init__(self, fake: FakeManager) -> None:
        self.fake = fake

    @refuses
    async def GetAgent(self, request: Any, context: Any) -> agent_pb2.GetAgentResponse:
        for agent in self.fake.agents:
            if agent.name == request.name:
                return agent_pb2.GetAgentResponse(agent=agent)
        raise NotFound(f"there is no agent `{request.name.rsplit('/', 1)[-1]}`")

    @refuses
    async def ListAgents(self, request: Any, context: Any) -> agent_pb2.ListAgentsResponse:
        items, token = page(self.fake.agents, request, self.fake)
        return agent_pb2.ListAgentsResponse(agents=items, next_page_token=token)


class Admin(admin_pb2_grpc.AdminServiceServicer):
    def __init__(self, fake: FakeManager) -> None:
        self.fake = fake

    @refuses
    async def GetCluster(self, request: Any, context: Any) -> admin_pb2.GetClusterResponse:
        self.fake.calls.append("GetCluster")
        return self.fake.cluster

    @refuses
    async def CreateJoinToken(self, request: Any, context: Any) -> admin_pb2.CreateJoinTokenResponse:
        self.fake.join_requests.append(request)
        response = admin_pb2.CreateJoinTokenResponse(token="dure_join_token")
        response.expire_time.GetCurrentTime()
        return response


def page(items: Any, request: Any, fake: FakeManager) -> tuple[list[Any], str]:
    start = int(request.page_token or 0)
    end = start + min(request.page_size or 100, fake.page_size_max)
    return list(items)[start:end], str(end) if end < len(items) else ""


async def until(condition: Callable[[], object], within_s: float = STEP_S) -> None:
    """Waits for a condition; fails loudly when it does not come true."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def fake_manager(port: int = 0, fake: FakeManager | None = None) -> AsyncIterator[FakeManager]:
    """A fake that serves while the block runs; given one, it serves that one's state again."""
    fake = fake or FakeManager()
    server = grpc.aio.server(options=list(SERVER_OPTIONS))
    endpoint_pb2_grpc.add_EndpointServiceServicer_to_server(Endpoints(fake), server)
    folder_pb2_grpc.add_FolderServiceServicer_to_server(Folders(fake), server)
    token_pb2_grpc.add_TokenServiceServicer_to_server(Tokens(fake), server)
    agent_pb2_grpc.add_AgentServiceServicer_to_server(Agents(fake), server)
    admin_pb2_grpc.add_AdminServiceServicer_to_server(Admin(fake), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    fake.address = f"127.0.0.1:{bound}"
    fake.context = Context(fake.address, KEY)
    await server.start()
    try:
        yield fake
    finally:
        await server.stop(None)


def write_context(fake: FakeManager, folder: Path) -> Path:
    path = folder / "context.toml"
    save_context(path, fake.context)
    return path
