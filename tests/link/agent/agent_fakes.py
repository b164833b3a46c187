"""A manager that behaves, on port 0, and agents as processes of their own that can be killed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import grpc.aio
import own_ports

from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.wire.channel import SERVER_OPTIONS

JOIN_TOKEN = "join-token-of-the-test"
# For a condition: met, it costs nothing. A machine that does much else makes everything wait.
WAIT_S = 60.0

SERVER = """
import http.server, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        code = 200
        if self.path == "/health" and os.path.exists("/tmp/" + os.environ["DURE_KERNEL_UID"] + ".sick"):
            code = 503
        body = (os.getcwd() + "|" + os.environ["HOME"] + "|" + " ".join(sys.argv[1:])).encode()
        self.send_response(code); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *a): print("request", self.path, flush=True)
http.server.ThreadingHTTPServer(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"""


@dataclass
class Answer:
    """What came for a request for a log. With `may_take` cleared nothing is read; `enough` ends it."""

    lines: list[tuple[int, bytes]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    begun: bool = False
    complete: bool = False
    enough: bool = False
    largest_bytes: int = 0
    may_take: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_take.set()


class FakeManager(fleet_pb2_grpc.FleetServiceServicer):
    """Keeps what it wants (`specs`, `removals`), and what agents said.

    Tests name kernels and sessions as they like. On the wire the names are unique: control groups, marks in
    environments and networks bear them, and tests run side by side. Two of one `mark` stand for one manager.
    """

    def __init__(self, storage: Path, storage_path: str | None = None, mark: str = "") -> None:
        self.mark = mark or secrets.token_hex(4)
        self.storage = storage
        self.storage_path = storage_path if storage_path is not None else str(storage)
        self.specs: dict[str, fleet_pb2.KernelSpec] = {}
        self.removals: dict[str, int] = {}
        self.statuses: dict[str, fleet_pb2.KernelStatus] = {}
        self.history: list[fleet_pb2.KernelStatus] = []
        self.hello: fleet_pb2.Hello | None = None
        self.streams = 0
        self.complete_reports = 0
        self.heartbeats = 0
        # When each came, by the monotonic clock.
        self.beats_s: list[float] = []
        # The newest that was said of the node's devices, by id, and of what it lacks.
        self.devices: dict[str, fleet_pb2.Device] = {}
        self.limitations: list[str] = []
        # What was measured, newest last.
        self.rounds: list[fleet_pb2.Measurements] = []
        self.acknowledge = True
        self.fetched: list[tuple[str, int]] = []
        self.cut_fetch_after: int | None = None
        self.credentials: dict[str, str] = {}
        # User and password for the registries of images, and the kernels for which they were asked.
        self.image_credential = ("", "")
        self.credential_asked: list[str] = []
        self.answers: dict[str, Answer] = {}
        self._outbox: asyncio.Queue[fleet_pb2.ConnectResponse] | None = None
        self._server: grpc.aio.Server | None = None
        self._changed = asyncio.Event()
        self.port = 0

    def wire(self, uid: str) -> str:
        """What agents know a kernel or a session by, of which tests speak as `uid`."""
        path, slash, name = uid.rpartition("/")
        return f"{path}{slash}{self.mark}-{name}"

    def plain(self, uid: str) -> str:
        """The other way round; names of others as they are."""
        return uid.removeprefix(f"{self.mark}-")

    async def start(self, port: int = 0) -> None:
        self._server = grpc.aio.server(options=list(SERVER_OPTIONS))
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        await self._server.start()

    async def stop(self) -> None:
        assert self._server is not None
        await self._server.stop(0)

    async def Join(self, request, context):
        if ("authorization", f"Bearer {JOIN_TOKEN}") not in context.invocation_metadata():
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the join token is not known")
        self.credentials[request.agent] = f"credential-of-{request.agent}"
        return fleet_pb2.JoinResponse(uid="agent-uid", credential=self.credentials[request.agent])

    async def Connect(self, requests, context):
        known = {f"Bearer {credential}" for credential in self.credentials.values()}
        if dict(context.invocation_metadata()).get("authorization") not in known:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the credential is not known")
        self.streams += 1
        outbox: asyncio.Queue[fleet_pb2.ConnectResponse] = asyncio.Queue()
        self._outbox = outbox
        listening = asyncio.create_task(self._listen(requests, outbox))
        try:
            while True:
                yield await outbox.get()
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening

    async def _listen(self, requests, outbox) -> None:
        async for request in requests:
            kind = request.WhichOneof("message")
            if kind == "hello":
                self.hello = request.hello
                self._take_devices(request.hello)
                self.statuses.clear()
                welcome = fleet_pb2.Welcome(
                    agent_uid="agent-uid",
                    heartbeat_interval_ms=500,
                    storage_path=self.storage_path,
                    storage_id="storage-1",
                )
                outbox.put_nowait(fleet_pb2.ConnectResponse(welcome=welcome))
                self.send_snapshot()
            elif kind == "observed":
                for status in request.observed.kernels:
                    status.uid = self.plain(status.uid)
                    self.statuses[status.uid] = status
                    self.history.append(status)
                self.complete_reports += request.observed.complete
            elif kind == "measurements":
                for kernel in request.measurements.kernels:
                    kernel.uid = self.plain(kernel.uid)
                self.rounds.append(request.measurements)
                del self.rounds[:-200]
            elif kind == "devices_changed":
                self._take_devices(request.devices_changed)
            else:
                self.heartbeats += 1
                self.beats_s.append(time.monotonic())
                if self.acknowledge:
                    ack = fleet_pb2.HeartbeatAck(sequence=request.heartbeat.sequence)
                    outbox.put_nowait(fleet_pb2.ConnectResponse(heartbeat_ack=ack))
            self._changed.set()

    def _take_devices(self, said) -> None:
        self.devices = {device.id: device for device in said.devices}
        self.limitations = list(said.limitations)

    async def SendLogs(self, requests, context):
        answer: Answer | None = None
        async for request in requests:
            answer = answer or self.answers[request.request_id]
            answer.begun = True
            assert not answer.complete, "nothing follows the last message"
            await answer.may_take.wait()
            answer.lines += [(line.time_ms, line.text) for line in request.lines]
            answer.notices += [request.notice] if request.notice else []
            answer.largest_bytes = max(answer.largest_bytes, request.ByteSize())
            answer.complete = request.complete
            self._changed.set()
            if answer.enough:
                break
        self._changed.set()
        return fleet_pb2.SendLogsResponse()

    def ask_log(self, uid: str, **wanted) -> Answer:
        assert self._outbox is not None
        answer = Answer()
        number = f"log-{len(self.answers)}"
        self.answers[number] = answer
        request = fleet_pb2.LogRequest(request_id=number, kernel_uid=self.wire(uid), **wanted)
        self._outbox.put_nowait(fleet_pb2.ConnectResponse(log_request=request))
        return answer

    async def log_of(self, uid: str, **wanted) -> list[str]:
        answer = self.ask_log(uid, **wanted)
        await self.until(lambda: answer.complete)
        return [text.decode() for _, text in answer.lines]

    async def GetImageCredential(self, request, context):
        self.credential_asked.append(self.plain(request.kernel_uid))
        username, password = self.image_credential
        return fleet_pb2.GetImageCredentialResponse(username=username, password=password)

    async def GetFolderManifest(self, request, context):
        folder = self.storage / request.folder_uid
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                file = fleet_pb2.ManifestFile(
                    path=str(path.relative_to(folder)),
                    size_bytes=len(data),
                    mode=0o644,
                    sha256=hashlib.sha256(data).hexdigest(),
                )
                yield fleet_pb2.GetFolderManifestResponse(files=[file])

    async def FetchFile(self, request, context):
        self.fetched.append((request.path, request.offset))
        data = (self.storage / request.folder_uid / request.path).read_bytes()[request.offset :]
        for start in range(0, len(data), 65536):
            if self.cut_fetch_after is not None and start >= self.cut_fetch_after:
                self.cut_fetch_after = None
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the line broke")
            yield fleet_pb2.FetchFileResponse(data=data[start : start + 65536])

    def send(self, desired: fleet_pb2.Desired) -> None:
        assert self._outbox is not None
        response = fleet_pb2.ConnectResponse(desired=desired)
        for spec in response.desired.kernels:
            spec.uid, spec.session_uid = self.wire(spec.uid), self.wire(spec.session_uid)
        for removal in response.desired.removals:
            removal.uid = self.wire(removal.uid)
        self._outbox.put_nowait(response)

    def measure_every(self, interval_ms: int) -> None:
        assert self._outbox is not None
        interval = fleet_pb2.MeasureInterval(interval_ms=interval_ms)
        self._outbox.put_nowait(fleet_pb2.ConnectResponse(measure_interval=interval))

    def values(self, uid: str) -> dict[str, float]:
        """The newest that was measured of a kernel; nothing if the newest round does not have it."""
        newest = self.rounds[-1].kernels if self.rounds else []
        return next((dict(kernel.values) for kernel in newest if kernel.uid == uid), {})

    def send_snapshot(self) -> None:
        for spec in self.specs.values():
            self.send(fleet_pb2.Desired(snapshot=True, kernels=[spec]))
        gone = [fleet_pb2.KernelRemoval(uid=uid, generation=n) for uid, n in self.removals.items()]
        self.send(fleet_pb2.Desired(snapshot=True, complete=True, removals=gone))

    def want(self, *specs: fleet_pb2.KernelSpec) -> None:
        for spec in specs:
            self.specs[spec.uid] = spec
        self.send(fleet_pb2.Desired(kernels=specs))

    def unwant(self, uid: str) -> None:
        generation = self.specs.pop(uid).generation + 1
        self.send(fleet_pb2.Desired(removals=[fleet_pb2.KernelRemoval(uid=uid, generation=generation)]))

    async def until(self, condition: Callable[[], bool], limit_s: float = WAIT_S) -> None:
        try:
            async with asyncio.timeout(limit_s):
                while not condition():
                    self._changed.clear()
                    # Conditions can depend on processes too, which wake nobody.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(0.02):
                            await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"never came true; statuses: {self.statuses}") from None

    async def status(
        self, uid: str, condition: Callable[[fleet_pb2.KernelStatus], bool], limit_s: float = WAIT_S
    ) -> fleet_pb2.KernelStatus:
        await self.until(lambda: uid in self.statuses and condition(self.statuses[uid]), limit_s)
        return self.statuses[uid]

    async def healthy(self, uid: str) -> fleet_pb2.KernelStatus:
        return await self.status(uid, lambda s: s.health == fleet_pb2.KERNEL_HEALTH_HEALTHY)

    async def exited(self, uid: str, limit_s: float = WAIT_S) -> fleet_pb2.KernelStatus:
        return await self.status(uid, lambda s: s.phase == fleet_pb2.KERNEL_PHASE_EXITED, limit_s)

    async def gone(self, uid: str) -> fleet_pb2.KernelStatus:
        return await self.status(uid, lambda s: s.phase == fleet_pb2.KERNEL_PHASE_GONE)


class AgentProcess:
    """`dure agent` as a process."""

    def __init__(
        self,
        data_dir: Path,
        manager: FakeManager,
        *arguments: str,
        name: str = "node-1",
        prefix: Sequence[str] = (),
    ) -> None:
        self._prefix = prefix
        self.manager = manager
        self.data_dir = data_dir
        self.home = data_dir / "agents" / name
        self.log = data_dir / f"{name}.log"
        self.arguments = [
            *("--data-dir", str(data_dir), "--name", name, "--manager", f"127.0.0.1:{manager.port}"),
            *("--lease-dir", str(data_dir / "leases"), "--log-file", str(self.log)),
            *("--session-ports", own_ports.option(own_ports.sessions()), *arguments),
        ]
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *(*self._prefix, sys.executable, "-m", "dure.agent.main", *self.arguments),
            env={**os.environ, "DURE_JOIN_TOKEN": JOIN_TOKEN},
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )

    async def end(self, number: int, limit_s: float = WAIT_S) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
        async with asyncio.timeout(limit_s):
            await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode

    def kernel_folder(self, uid: str) -> Path:
        return self.home / "kernels" / self.manager.wire(uid)


@contextlib.asynccontextmanager
async def cluster(
    tmp_path: Path,
    *arguments: str,
    storage_path: str | None = None,
    limit_s: float = 200.0,
    prefix: Sequence[str] = (),
) -> AsyncIterator[tuple[FakeManager, AgentProcess]]:
    """A manager and an agent; afterwards nothing of them runs, and the agent's log holds no trace."""
    storage = tmp_path / "storage"
    (storage / "folder-1").mkdir(parents=True)
    (storage / ".storage-id").write_text("storage-1")
    (storage / "folder-1" / "server.py").write_text(SERVER)
    manager = FakeManager(storage, storage_path)
    await manager.start()
    agent = AgentProcess(tmp_path / "data", manager, *arguments, prefix=prefix)
    async with asyncio.timeout(limit_s):
        try:
            await agent.start()
            await manager.until(lambda: manager.complete_reports == 1)
            yield manager, agent
        finally:
            if agent.process is not None and agent.process.returncode is None:
                await agent.end(signal.SIGTERM)
            cleaner = AgentProcess(
                tmp_path / "data", manager, *_backend(arguments), "--stop-sessions", prefix=prefix
            )
            await cleaner.start()
            assert cleaner.process is not None
            assert await cleaner.process.wait() == 0
            await cleaner.process.communicate()
            await manager.stop()
    assert processes_of(tmp_path) == []
    text = agent.log.read_text() if agent.log.exists() else ""
    assert "Traceback" not in text, text


def _backend(arguments: Sequence[str]) -> list[str]:
    """The options among them that say what runs kernels."""
    return [word for pair in pairwise(arguments) if pair[0] in ("--backend", "--engine") for word in pair]


def processes_of(tmp_path: Path) -> list[str]:
    """Command lines of processes that have something to do with the test."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(tmp_path) in line and int(folder.name) != os.getpid():
            found.append(f"{folder.name} {line}")
    return found


def spec(
    uid: str, command: list[str] | str | None = None, model_path: str = "/models", **fields
) -> fleet_pb2.KernelSpec:
    """A kernel that serves HTTP, probed often, unless the arguments say otherwise."""
    result = fleet_pb2.KernelSpec(
        uid=uid,
        session_uid=f"session-{uid}",
        generation=1,
        replica_uid=f"replica-{uid}",
        endpoint="e",
        project="p",
        command=fleet_pb2.Command(model_path=model_path),
        environ={"GREETING": "hello"},
        slots={"cpu": 1000, "mem": 512 * 2**20 * 1000},
        model=fleet_pb2.Mount(folder_uid="folder-1", folder="m", target="/models"),
        port=8000,
        stop_grace_ms=3000,
        model_name="demo",
    )
    if isinstance(command, str):
        result.command.shell.CopyFrom(fleet_pb2.Shell(shell="/bin/bash", line=command))
    else:
        arguments = command or ["python", "{model_path}/server.py", "{port}"]
        result.command.argv.CopyFrom(fleet_pb2.Argv(args=arguments))
    if "health_check" not in fields:
        result.health_check.CopyFrom(
            fleet_pb2.HealthCheck(
                path="/health",
                interval_ms=100,
                max_retries=5,
                max_wait_time_ms=2000,
                expected_status_code=200,
            )
        )
    elif fields["health_check"] is None:
        del fields["health_check"]
    result.MergeFrom(fleet_pb2.KernelSpec(**fields))
    return result


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
