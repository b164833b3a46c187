"""The stand-in manager: a real server of FleetService that keeps what the agent says and breaks on demand.

It is as strict as a manager may be: what the protocol forbids is noted (`broken_rules`), and the rest of the
talk goes on, so that one mistake of an agent fails one check.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.wire.channel import PIECE_BYTES, SERVER_OPTIONS

JOIN_TOKEN = "join-token-of-the-conformance-suite"
AGENT_UID = "0197c0de-0000-7000-8000-000000000001"
STORAGE_ID = "storage-of-the-conformance-suite"
HEARTBEAT_MS = 500
# An agent that never reports everything is given work nevertheless: only that rule is broken.
REPORT_PATIENCE_S = 4.0
KERNELS_MAX = 256
_STOP_LIMIT_S = 5.0
LOG_BYTES_MAX = 256 * 1024
_HISTORY_MAX, _LINES_MAX, _OUTBOX_MAX, _BROKEN_MAX = 2_000, 100_000, 10_000, 100
Context = Any  # grpc.aio.ServicerContext; its stubs are generic in ways that help nobody here


@dataclass
class Answer:
    """What came for a request for a log."""

    lines: list[tuple[int, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    begun: bool = False
    complete: bool = False
    largest_bytes: int = 0


@dataclass
class Stream:
    """One call of Connect, from its Hello on. `beats` are when heartbeats came, and their numbers."""

    began_s: float
    outbox: asyncio.Queue[fleet_pb2.ConnectResponse | None]
    hello: fleet_pb2.Hello | None = None
    # Kernels of the full report, and when it was complete; 0 while it is not.
    reported: dict[str, fleet_pb2.KernelStatus] = field(default_factory=dict)
    complete_s: float = 0.0
    announced_s: float = 0.0
    ended_s: float = 0.0
    beats: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_HISTORY_MAX))


class Manager(fleet_pb2_grpc.FleetServiceServicer):
    """Keeps what it wants (`specs`, `removals`) and what the agent said. Lives on one event loop."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        # What Welcome says, which a check may change.
        self.storage_path = str(storage)
        self.acknowledge = True
        # Seconds between the pieces of a snapshot, of one kernel each.
        self.piece_pause_s = 0.0
        self.specs: dict[str, fleet_pb2.KernelSpec] = {}
        self.removals: dict[str, int] = {}
        self.statuses: dict[str, fleet_pb2.KernelStatus] = {}
        # All that was said of a kernel, each with its time, and what was measured of it.
        self.history: dict[str, deque[tuple[float, fleet_pb2.KernelStatus]]] = defaultdict(_bounded)
        self.measured: dict[str, deque[tuple[float, dict[str, float]]]] = defaultdict(_bounded)
        self.joins: list[str] = []
        self.streams: list[Stream] = []
        self.answers: dict[str, Answer] = {}
        # Folder, path and offset of every piece of a file that was asked for.
        self.fetched: list[tuple[str, str, int]] = []
        # Uids of kernels for whose image a credential was asked.
        self.credentials_asked: list[str] = []
        # Rule and sentence.
        self.broken_rules: list[tuple[str, str]] = []
        self.port = 0
        self._credentials: dict[str, str] = {}
        self._server: grpc.aio.Server | None = None
        self._pulse = asyncio.Event()

    @property
    def stream(self) -> Stream | None:
        """The newest, unless it ended or has not said Hello."""
        newest = self.streams[-1] if self.streams else None
        return newest if newest is not None and newest.hello is not None and not newest.ended_s else None

    @property
    def hello(self) -> fleet_pb2.Hello | None:
        """The newest that was said."""
        return next((one.hello for one in reversed(self.streams) if one.hello is not None), None)

    async def start(self) -> None:
        """On the same port as before, if there was one. Raises RuntimeError if that is taken."""
        self._server = grpc.aio.server(options=list(SERVER_OPTIONS))
        fleet_pb2_grpc.add_FleetServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Vanishes, as a manager that was killed."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(0)
            # Stopping is over before the handlers have seen it.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_LIMIT_S):
                    await self.until(lambda: all(stream.ended_s for stream in self.streams))

    def hang_up(self) -> None:
        """Ends the stream, as a manager does that is about to be replaced."""
        if self.stream is not None:
            self.stream.outbox.put_nowait(None)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Looks again whenever the agent says something, and a few times a second."""
        while not condition():
            pulse = self._pulse
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await pulse.wait()

    def want(self, *specs: fleet_pb2.KernelSpec) -> None:
        for spec in specs:
            self.specs[spec.uid] = spec
        self.send(fleet_pb2.ConnectResponse(desired=fleet_pb2.Desired(kernels=specs)))

    def remove(self, uid: str, generation: int) -> None:
        self.specs.pop(uid, None)
        self.removals[uid] = generation
        gone = fleet_pb2.KernelRemoval(uid=uid, generation=generation)
        self.send(fleet_pb2.ConnectResponse(desired=fleet_pb2.Desired(removals=[gone])))

    def forget(self, uid: str) -> None:
        """Wants a kernel no more, without saying so: the next snapshot leaves it out."""
        self.specs.pop(uid, None)
        self.removals.pop(uid, None)

    def send(self, message: fleet_pb2.ConnectResponse) -> None:
        """To the stream that is there, if one is."""
        if self.stream is not None:
            self.stream.outbox.put_nowait(message)

    def ask_log(self, uid: str, **wanted: Any) -> Answer:
        answer = Answer()
        number = f"log-{len(self.answers)}"
        self.answers[number] = answer
        request = fleet_pb2.LogRequest(request_id=number, kernel_uid=uid, **wanted)
        self.send(fleet_pb2.ConnectResponse(log_request=request))
        return answer

    async def Join(self, request: fleet_pb2.JoinRequest, context: Context) -> fleet_pb2.JoinResponse:
        if _secret(context) != JOIN_TOKEN:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the join token is not known")
        self.joins.append(request.agent)
        credential = self._credentials.setdefault(request.agent, f"credential-of-{request.agent}")
        self._beat()
        return fleet_pb2.JoinResponse(uid=AGENT_UID, credential=credential)

    async def Connect(
        self, requests: AsyncIterator[fleet_pb2.ConnectRequest], context: Context
    ) -> AsyncIterator[fleet_pb2.ConnectResponse]:
        await self._authenticate(context)
        if self.stream is not None:
            self.stream.outbox.put_nowait(None)
        stream = Stream(time.monotonic(), asyncio.Queue(_OUTBOX_MAX))
        self.streams.append(stream)
        listening = asyncio.create_task(self._listen(requests, stream))
        announcing = asyncio.create_task(self._announce(stream))
        try:
            while (message := await stream.outbox.get()) is not None:
                yield message
            await context.abort(grpc.StatusCode.ABORTED, "the manager ends this stream")
        finally:
            stream.ended_s = time.monotonic()
            for task in (listening, announcing):
                task.cancel()
            await asyncio.gather(listening, announcing, return_exceptions=True)
            self._beat()

    async def SendLogs(
        self, requests: AsyncIterator[fleet_pb2.SendLogsRequest], context: Context
    ) -> fleet_pb2.SendLogsResponse:
        await self._authenticate(context)
        answer: Answer | None = None
        async for request in requests:
            if request.request_id not in self.answers:
                self._broken("11.1", f"SendLogs names a request `{request.request_id}` that nobody made")
                break
            answer = self.answers[request.request_id]
            answer.begun = True
            if answer.complete:
                self._broken("11.1", "SendLogs goes on after complete = true")
            if len(answer.lines) < _LINES_MAX:
                answer.lines += [(one.time_ms, one.text.decode(errors="replace")) for one in request.lines]
            answer.notices += [request.notice] if request.notice else []
            answer.largest_bytes = max(answer.largest_bytes, request.ByteSize())
            answer.complete = answer.complete or request.complete
            self._beat()
        return fleet_pb2.SendLogsResponse()

    async def GetFolderManifest(
        self, request: fleet_pb2.GetFolderManifestRequest, context: Context
    ) -> AsyncIterator[fleet_pb2.GetFolderManifestResponse]:
        await self._authenticate(context)
        folder = await self._folder(request.folder_uid, context)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                data = path.read_bytes()
                file = fleet_pb2.ManifestFile(
                    path=str(path.relative_to(folder)),
                    size_bytes=len(data),
                    mode=path.stat().st_mode & 0o777,
                    sha256=hashlib.sha256(data).hexdigest(),
                )
                yield fleet_pb2.GetFolderManifestResponse(files=[file])

    async def FetchFile(
        self, request: fleet_pb2.FetchFileRequest, context: Context
    ) -> AsyncIterator[fleet_pb2.FetchFileResponse]:
        await self._authenticate(context)
        self.fetched.append((request.folder_uid, request.path, request.offset))
        folder = await self._folder(request.folder_uid, context)
        path = folder / request.path
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            await context.abort(grpc.StatusCode.NOT_FOUND, f"the folder has no file `{request.path}`")
        data = path.read_bytes()[request.offset :]
        for start in range(0, len(data), PIECE_BYTES):
            yield fleet_pb2.FetchFileResponse(data=data[start : start + PIECE_BYTES])

    async def GetImageCredential(
        self, request: fleet_pb2.GetImageCredentialRequest, context: Context
    ) -> fleet_pb2.GetImageCredentialResponse:
        await self._authenticate(context)
        self.credentials_asked.append(request.kernel_uid)
        return fleet_pb2.GetImageCredentialResponse()

    async def _folder(self, uid: str, context: Context) -> Path:
        folder = self.storage / uid
        if "/" in uid or not folder.is_dir():
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no folder `{uid}`")
        return folder

    async def _authenticate(self, context: Context) -> None:
        if _secret(context) not in self._credentials.values():
            self._broken("1.2", "a call came without the credential that Join gave")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the credential is not known")

    async def _listen(self, requests: AsyncIterator[fleet_pb2.ConnectRequest], stream: Stream) -> None:
        async for request in requests:
            kind = request.WhichOneof("message")
            if (kind == "hello") != (stream.hello is None):
                self._broken("2.1", f"`{kind}` came {'before' if stream.hello is None else 'after'} Hello")
            if kind == "hello":
                stream.hello = request.hello
                self._welcome(stream)
            elif kind == "observed":
                self._observe(request.observed, stream)
            elif kind == "heartbeat":
                stream.beats.append((time.monotonic(), request.heartbeat.sequence))
                if self.acknowledge:
                    ack = fleet_pb2.HeartbeatAck(sequence=request.heartbeat.sequence)
                    stream.outbox.put_nowait(fleet_pb2.ConnectResponse(heartbeat_ack=ack))
            elif kind == "devices_changed" and stream.hello is not None:
                del stream.hello.devices[:]
                stream.hello.devices.extend(request.devices_changed.devices)
            elif kind == "measurements":
                if len(request.measurements.kernels) > KERNELS_MAX:
                    self._broken("2.4", f"Measurements of {len(request.measurements.kernels)} kernels")
                for kernel in request.measurements.kernels:
                    self.measured[kernel.uid].append((time.monotonic(), dict(kernel.values)))
            self._beat()
        # The agent hung up.
        stream.outbox.put_nowait(None)

    def _welcome(self, stream: Stream) -> None:
        welcome = fleet_pb2.Welcome(
            agent_uid=AGENT_UID,
            heartbeat_interval_ms=HEARTBEAT_MS,
            storage_path=self.storage_path,
            storage_id=STORAGE_ID,
        )
        stream.outbox.put_nowait(fleet_pb2.ConnectResponse(welcome=welcome))

    def _observe(self, observed: fleet_pb2.Observed, stream: Stream) -> None:
        if len(observed.kernels) > KERNELS_MAX:
            self._broken("2.4", f"Observed of {len(observed.kernels)} kernels")
        for status in observed.kernels:
            if not status.uid or status.phase == fleet_pb2.KERNEL_PHASE_UNSPECIFIED:
                self._broken("3.2", f"a status without uid or phase: {status}")
            self.statuses[status.uid] = status
            self.history[status.uid].append((time.monotonic(), status))
            if not stream.complete_s:
                stream.reported[status.uid] = status
        if observed.complete:
            if stream.complete_s:
                self._broken("3.1", "a second Observed with complete = true on one stream")
            stream.complete_s = time.monotonic()
            # What a full report leaves out is not there any more.
            self.statuses = {uid: one for uid, one in self.statuses.items() if uid in stream.reported}

    async def _announce(self, stream: Stream) -> None:
        """Says what is wanted once the agent has reported everything."""
        await self.until(lambda: stream.hello is not None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPORT_PATIENCE_S):
                await self.until(lambda: stream.complete_s > 0)
        stream.announced_s = time.monotonic()
        for spec in list(self.specs.values()):
            piece = fleet_pb2.Desired(snapshot=True, kernels=[spec])
            stream.outbox.put_nowait(fleet_pb2.ConnectResponse(desired=piece))
            if self.piece_pause_s:
                await asyncio.sleep(self.piece_pause_s)
        gone = [fleet_pb2.KernelRemoval(uid=uid, generation=n) for uid, n in self.removals.items()]
        last = fleet_pb2.Desired(snapshot=True, complete=True, removals=gone)
        stream.outbox.put_nowait(fleet_pb2.ConnectResponse(desired=last))

    def _broken(self, rule: str, sentence: str) -> None:
        if len(self.broken_rules) < _BROKEN_MAX and (rule, sentence) not in self.broken_rules:
            self.broken_rules.append((rule, sentence))

    def _beat(self) -> None:
        pulse, self._pulse = self._pulse, asyncio.Event()
        pulse.set()


def _bounded() -> deque[Any]:
    return deque(maxlen=_HISTORY_MAX)


def _secret(context: Context) -> str:
    metadata = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
    return metadata.get("authorization", "").removeprefix("Bearer ")
