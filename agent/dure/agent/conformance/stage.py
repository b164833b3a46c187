"""What one check sees: the stand-in manager, the agent's program, and kernels of its own."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from dure.agent.conformance import specs
from dure.agent.conformance.manager import Answer, Manager, Stream
from dure.agent.conformance.outcome import Failed, NotApplicable, demand
from dure.agent.conformance.program import Program
from dure.fleet.v1 import fleet_pb2

# Losing the stream, or the program's start, until everything was reported. The protocol says 1 s of backoff.
RECONNECT_LIMIT_S = 8.0
CLEAN_LIMIT_S = 20.0
_REQUEST_LIMIT_S = 15.0
Condition = Callable[[fleet_pb2.KernelStatus], bool]


@dataclass(frozen=True)
class Subject:
    """The agent under test, and what all checks share. `image` is empty for agents that run none."""

    manager: Manager
    program: Program
    http: aiohttp.ClientSession
    name: str
    image: str


class Stage:
    """Waits have no limit of their own: the check has one, and `awaited` says what it was waiting for."""

    def __init__(self, subject: Subject) -> None:
        self.manager = subject.manager
        self.program = subject.program
        self.name = subject.name
        self.image = subject.image
        self._http = subject.http
        self._uids: list[str] = []
        self._awaited: tuple[str, Callable[[], str]] = ("its end", lambda: "nothing")

    @property
    def awaited(self) -> Failed:
        """What the check waits for, and what is there instead."""
        expected, seen = self._awaited
        return Failed(expected, seen())

    @property
    def hello(self) -> fleet_pb2.Hello:
        """Of the newest stream."""
        hello = self.manager.hello
        if hello is None:
            raise Failed("an agent that is connected", self.program.end() or "no Hello")
        return hello

    def spec(self, command: Sequence[str] | str = specs.SERVE, **fields: Any) -> fleet_pb2.KernelSpec:
        """See `specs.kernel`. The kernel is removed when the check is over."""
        folder = fields.pop("folder", None) or self.folder({"weights.txt": "weights\n"})
        uid = str(uuid.uuid4())
        self._uids.append(uid)
        image = fields.pop("image", self.image)
        return specs.kernel(uid, str(uuid.uuid4()), folder, image, command, **fields)

    def folder(self, files: Mapping[str, str]) -> str:
        """Uid of a folder of the manager's storage with these files."""
        uid = str(uuid.uuid4())
        for path, content in files.items():
            file = self.manager.storage / uid / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content, encoding="utf-8")
        return uid

    def stored(self, folder_uid: str) -> Path:
        """Where a folder of the manager's storage really is."""
        return self.manager.storage / folder_uid

    async def until(self, condition: Callable[[], bool], expected: str, seen: Callable[[], str]) -> None:
        self._awaited = expected, seen
        while not condition():
            if not self.program.runs:
                raise Failed(expected, self.program.end() or "its program does not run")
            try:
                async with asyncio.timeout(0.5):
                    await self.manager.until(condition)
            except TimeoutError:
                continue

    async def status(self, uid: str, condition: Condition, expected: str) -> fleet_pb2.KernelStatus:
        """Waits until the kernel's newest status fulfils the condition."""

        def holds() -> bool:
            found = self.manager.statuses.get(uid)
            return found is not None and condition(found)

        await self.until(holds, expected, lambda: specs.told(self.manager.statuses.get(uid)))
        return self.manager.statuses[uid]

    async def _alive(self, uid: str, condition: Condition, expected: str) -> fleet_pb2.KernelStatus:
        """As `status`; an end meanwhile is a failure at once."""
        ended = (fleet_pb2.KERNEL_PHASE_EXITED, fleet_pb2.KERNEL_PHASE_GONE)
        status = await self.status(uid, lambda s: condition(s) or s.phase in ended, expected)
        demand(condition(status), expected, specs.told(status))
        return status

    async def running(self, spec: fleet_pb2.KernelSpec) -> fleet_pb2.KernelStatus:
        """Asks for the kernel, and waits until its command runs."""
        self.manager.want(spec)
        return await self._alive(spec.uid, lambda s: s.phase == fleet_pb2.KERNEL_PHASE_RUNNING, "RUNNING")

    async def healthy(self, spec: fleet_pb2.KernelSpec) -> fleet_pb2.KernelStatus:
        """Asks for the kernel, and waits until it is RUNNING and HEALTHY."""
        self.manager.want(spec)
        return await self.become(spec, fleet_pb2.KERNEL_HEALTH_HEALTHY)

    async def become(
        self, spec: fleet_pb2.KernelSpec, health: fleet_pb2.KernelHealth.ValueType
    ) -> fleet_pb2.KernelStatus:
        return await self._alive(
            spec.uid,
            lambda s: s.phase == fleet_pb2.KERNEL_PHASE_RUNNING and s.health == health,
            f"RUNNING, {specs.health_name(health)}",
        )

    async def exited(self, spec: fleet_pb2.KernelSpec) -> fleet_pb2.KernelStatus:
        """Asks for the kernel, and waits until it ended by itself."""
        self.manager.want(spec)
        return await self.end(spec)

    async def end(self, spec: fleet_pb2.KernelSpec) -> fleet_pb2.KernelStatus:
        return await self.status(spec.uid, lambda s: s.phase == fleet_pb2.KERNEL_PHASE_EXITED, "EXITED")

    async def refused(self, spec: fleet_pb2.KernelSpec, reason: str) -> fleet_pb2.KernelStatus:
        """Asks for a kernel that cannot be, and waits until it ended with that reason, and a sentence."""
        self.manager.want(spec)
        phases = (fleet_pb2.KERNEL_PHASE_EXITED, fleet_pb2.KERNEL_PHASE_RUNNING)
        status = await self.status(spec.uid, lambda s: s.phase in phases, f"EXITED with {reason}")
        demand(
            status.exit.reason == reason and status.exit.message,
            f"EXITED with {reason} and a message for people",
            specs.told(status),
        )
        return status

    async def gone(self, uid: str, generation: int = 2) -> fleet_pb2.KernelStatus:
        """Removes the kernel, and waits until nothing is left of it."""
        self.manager.remove(uid, generation)
        return await self.status(uid, lambda s: s.phase == fleet_pb2.KERNEL_PHASE_GONE, "GONE")

    async def lines(self, line: str, unless: str = "", **fields: Any) -> list[str]:
        """What a line for /bin/sh writes, at most 4 KiB. `unless` is as in `not_if_limited`."""
        spec = self.spec(f"{line}\nexit 0", **fields)
        status = await self.exited(spec)
        if unless:
            self.not_if_limited(status, unless)
        demand(
            status.exit.reason == "EXITED" and status.exit.code == 0,
            "EXITED with code 0",
            specs.told(status),
        )
        return status.exit.log_tail.splitlines()

    def not_if_limited(self, status: fleet_pb2.KernelStatus, word: str) -> None:
        """Raises NotApplicable if the agent refused the kernel, and Hello says with that word that its node
        lacks what it needs."""
        if status.exit.reason == "START_FAILED":
            self.not_if_said(word)

    def not_if_said(self, word: str) -> None:
        """Raises NotApplicable if a limitation in Hello has the word."""
        for limitation in self.hello.limitations:
            if word in limitation:
                raise NotApplicable(f"Hello says: {limitation}")

    async def ask(self, status: fleet_pb2.KernelStatus, path: str = "") -> dict[str, Any]:
        """What the program of `specs.SERVER` answers. Raises Failed if it cannot be reached."""
        host = f"[{status.host}]" if ":" in status.host else status.host
        url = f"http://{host}:{status.port}/{path}"
        try:
            limit = aiohttp.ClientTimeout(total=_REQUEST_LIMIT_S)
            async with self._http.get(url, timeout=limit) as reply:
                answer: dict[str, Any] = await reply.json(content_type=None)
                return answer
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise Failed(f"an answer at {url}", f"{type(error).__name__}: {error}") from error

    async def said(self, uid: str, text: str) -> None:
        """Waits until the kernel wrote a line with the text to its log."""
        answer = self.manager.ask_log(uid, follow=True)
        await self.until(
            lambda: any(text in line for _, line in answer.lines) or answer.complete,
            f"`{text}` in the kernel's log",
            lambda: f"a log of {len(answer.lines)} lines",
        )
        demand(
            any(text in line for _, line in answer.lines), f"`{text}` in the kernel's log", "it is not there"
        )

    async def log(self, uid: str, **wanted: Any) -> Answer:
        """The answer to a request for a log, when it is complete."""
        answer = self.manager.ask_log(uid, **wanted)
        await self.until(
            lambda: answer.complete,
            "SendLogs with complete = true",
            lambda: f"{len(answer.lines)} lines, not complete" if answer.begun else "no call of SendLogs",
        )
        return answer

    async def connected(self, after: Stream | None = None) -> Stream:
        """Waits for a stream, another than `after`, on which everything was reported and wishes were sent."""

        def there() -> bool:
            stream = self.manager.stream
            return stream is not None and stream is not after and stream.announced_s > 0

        await self.until(there, "a stream with Hello", lambda: "no stream" if self.hello else "no Hello")
        assert self.manager.stream is not None
        return self.manager.stream

    async def restart(self, between: Callable[[], Any] | None = None) -> Stream:
        """Kills the agent and starts it again."""
        before = self.manager.stream
        await self.program.kill()
        if before is not None:
            self._awaited = (
                "its stream to end with the program (a wrapper must exec the agent)",
                lambda: "the stream goes on",
            )
            await self.manager.until(lambda: before.ended_s > 0)
        if between is not None:
            await between()
        await self.program.start()
        return await self.connected(before)

    async def clean(self) -> None:
        """Removes what the check asked for. Raises Failed if something stays."""
        left = []
        for uid in self._uids:
            if uid in self.manager.specs:
                self.manager.remove(uid, self.manager.specs[uid].generation + 1)
            status = self.manager.statuses.get(uid)
            if status is not None and status.phase != fleet_pb2.KERNEL_PHASE_GONE:
                left.append(uid)
        gone = fleet_pb2.KERNEL_PHASE_GONE
        try:
            async with asyncio.timeout(CLEAN_LIMIT_S):
                for uid in left:
                    await self.status(uid, lambda s: s.phase == gone, "GONE after its removal")
        except TimeoutError as error:
            raise self.awaited from error
        finally:
            for uid in self._uids:
                self.manager.forget(uid)
