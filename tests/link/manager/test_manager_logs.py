"""Logs through the manager: from an agent that behaves to the library, with whatever happens in between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from link.manager.inside import Inside, manager_inside, model_folder, until, with_inside

from dure.client import Client
from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.v1 import admin_pb2
from dure.wire import errors
from dure.wire.channel import bearer, open_channel

START_MS = 1_700_000_000_000


class TalkingAgent:
    """An agent whose kernels write what the test says: `logs` by uid of the kernel."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.credential = ""
        self.specs: dict[str, fleet_pb2.KernelSpec] = {}
        self.logs: dict[str, list[str]] = {}
        self.requests: list[fleet_pb2.LogRequest] = []
        self.sent_bytes = 0
        self.open_answers = 0
        self._generations: dict[str, int] = {}
        self._call: Any = None
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def running(self, token: str = "") -> AsyncIterator[None]:
        async with open_channel(self.address) as channel:
            stub: Any = fleet_pb2_grpc.FleetServiceStub(channel)
            self._stub = stub
            if not self.credential:
                joined = await stub.Join(fleet_pb2.JoinRequest(agent="talker"), metadata=bearer(token))
                self.credential = joined.credential
            self._call = stub.Connect(metadata=bearer(self.credential))
            hello = fleet_pb2.Hello(protocol_version=1, backend="fake", host_id="h", architecture="x86_64")
            hello.slots["cpu"], hello.slots["mem"] = 64_000, 2**40
            hello.maps_mounts = True
            await self._call.write(fleet_pb2.ConnectRequest(hello=hello))
            known = [self._status(uid) for uid in self.specs]
            await self._call.write(
                fleet_pb2.ConnectRequest(observed=fleet_pb2.Observed(kernels=known, complete=True))
            )
            tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._beat())]
            try:
                yield
            finally:
                tasks += self._tasks
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._call.cancel()

    async def _beat(self) -> None:
        while True:
            await self._call.write(fleet_pb2.ConnectRequest(heartbeat=fleet_pb2.Heartbeat(sequence=1)))
            await asyncio.sleep(0.5)

    async def _listen(self) -> None:
        while (message := await self._call.read()) is not grpc.aio.EOF:
            for spec in message.desired.kernels:
                self._generations[spec.uid] = spec.generation
                if spec.uid not in self.specs:
                    self.specs[spec.uid] = spec
                    self.logs.setdefault(spec.uid, [f"start of {spec.uid}"])
                await self.report(self._status(spec.uid))
            for gone in message.desired.removals:
                self._generations[gone.uid] = gone.generation
                self.specs.pop(gone.uid, None)
                await self.report(
                    fleet_pb2.KernelStatus(
                        uid=gone.uid, generation=gone.generation, phase="KERNEL_PHASE_GONE"
                    )
                )
            if message.HasField("log_request"):
                self.requests.append(message.log_request)
                task = asyncio.create_task(self._send_log(message.log_request))
                self._tasks.add(task)

    async def report(self, status: fleet_pb2.KernelStatus) -> None:
        await self._call.write(fleet_pb2.ConnectRequest(observed=fleet_pb2.Observed(kernels=[status])))

    def _status(self, uid: str) -> fleet_pb2.KernelStatus:
        return fleet_pb2.KernelStatus(
            uid=uid,
            generation=self._generations[uid],
            phase="KERNEL_PHASE_RUNNING",
            health="KERNEL_HEALTH_HEALTHY",
            host="127.0.0.1",
            port=20_000,
            pid=1,
        )

    async def end(self, uid: str) -> None:
        status = self._status(uid)
        status.phase, status.health = fleet_pb2.KERNEL_PHASE_EXITED, fleet_pb2.KERNEL_HEALTH_DEGRADED
        status.exit.CopyFrom(fleet_pb2.KernelExit(reason="EXITED", code=1, message="it ended"))
        await self.report(status)

    async def _send_log(self, request: fleet_pb2.LogRequest) -> None:
        self.open_answers += 1
        call = self._stub.SendLogs(metadata=bearer(self.credential))
        try:
            lines, sent = self.logs[request.kernel_uid], 0
            await call.write(fleet_pb2.SendLogsRequest(request_id=request.request_id))
            if request.tail_lines:
                sent = max(0, len(lines) - request.tail_lines)
            while True:
                while sent < len(lines):
                    message = fleet_pb2.SendLogsRequest(request_id=request.request_id)
                    text = lines[sent].encode("utf-8", "surrogateescape")
                    # Three lines share a millisecond.
                    message.lines.add(time_ms=START_MS + sent // 3, text=text)
                    await call.write(message)
                    sent += 1
                    self.sent_bytes += len(text)
                if not request.follow or request.kernel_uid not in self.specs:
                    break
                await asyncio.sleep(0.02)
                if call.done():
                    return
            await call.write(fleet_pb2.SendLogsRequest(request_id=request.request_id, complete=True))
            await call.done_writing()
            await call
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return
        finally:
            self.open_answers -= 1
            call.cancel()


@contextlib.asynccontextmanager
async def talking(
    running: Inside, admin: Client, folder: Path, replicas: int = 1
) -> AsyncIterator[TalkingAgent]:
    """An agent that runs `replicas` of the endpoint `e`."""
    await model_folder(admin, folder)
    token = await admin.admin.create_join_token(admin_pb2.JOIN_ROLE_AGENT)
    agent = TalkingAgent(running.address)
    async with agent.running(token.token):
        slots = {"cpu": "1", "mem": "64m"}
        await admin.endpoints.create("e", model="m", replicas=replicas, resource_slots=slots)

        async def started() -> bool:
            return len(agent.specs) == replicas

        await until(started)
        yield agent


async def texts(client: Client, **wanted: Any) -> tuple[list[str], list[str]]:
    """Lines and notices of a read that ends."""
    lines, notices = [], []
    async with aclosing(client.endpoints.logs("e", **wanted)) as chunks:
        async for chunk in chunks:
            lines += [line.text for line in chunk.lines]
            notices += [chunk.notice] if chunk.notice else []
    return lines, notices


class Following:
    """A follow in the background."""

    def __init__(self, client: Client, **wanted: Any) -> None:
        self.lines: list[tuple[str, str]] = []
        self.notices: list[str] = []
        self.task = asyncio.create_task(self._run(client, wanted))

    async def _run(self, client: Client, wanted: dict[str, Any]) -> None:
        async with aclosing(client.endpoints.logs("e", follow=True, **wanted)) as chunks:
            async for chunk in chunks:
                self.lines += [(chunk.replica, line.text) for line in chunk.lines]
                self.notices += [chunk.notice] if chunk.notice else []

    async def until_it_has(self, text: str) -> None:
        async def there() -> bool:
            if self.task.done():
                self.task.result()
            return any(line == text for _, line in self.lines)

        await until(there)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def test_reads_of_what_is_there(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        async with talking(running, admin, tmp_path / "m", 2) as agent:
            one, two = agent.specs
            agent.logs[one] = ["a", "b", "c"]
            agent.logs[two] = ["x", "bad \udcff", "\x1b[31mred"]
            await until(lambda: reported(admin, 2))
            lines, notices = await texts(admin, tail_lines=0)
            assert sorted(lines) == sorted(["a", "b", "c", "x", "bad \ufffd", "\x1b[31mred"]) and not notices
            assert sorted((await texts(admin, tail_lines=1))[0]) == sorted(["c", "\x1b[31mred"])
            replica = agent.specs[one].replica_uid
            assert (await texts(admin, replica=replica, kernel="main1"))[0] == ["a", "b", "c"]
            await texts(admin, max_age_s=2.5)
            assert agent.requests[-1].max_age_ms == 2500 and not agent.requests[-1].follow
            with pytest.raises(errors.NotFound, match="no kernel `sub7`; there are main1"):
                await texts(admin, kernel="sub7")
            with pytest.raises(errors.NotFound, match="has no replica"):
                await texts(admin, replica="no-such")
            assert (await texts(admin, previous=True))[1] == [
                "no replica has ended, or its log is not kept any more"
            ]
            with pytest.raises(errors.InvalidInput) as caught:
                await texts(admin, previous=True, follow=True, tail_lines=-1, max_age_s=-1)
            assert {violation.field for violation in caught.value.violations} == {
                *("tail_lines", "max_age", "follow")
            }

    with_inside(tmp_path / "manager", body)


def test_previous_is_the_replica_that_ended_last(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        async with talking(running, admin, tmp_path / "m") as agent:
            (first,) = agent.specs
            agent.logs[first] = ["dying"]
            await until(lambda: reported(admin, 1))
            following = Following(admin)
            await following.until_it_has("dying")
            await agent.end(first)

            async def replaced() -> bool:
                return len(agent.logs) > 1 and first not in agent.specs

            await until(replaced)
            second = next(uid for uid in agent.logs if uid != first)
            # The follower has the new one from its first line on.
            await following.until_it_has(f"start of {second}")
            await following.stop()
            assert (await texts(admin, previous=True))[0] == ["dying"]
            assert (await texts(admin))[0] == [f"start of {second}"]

    with_inside(tmp_path / "manager", body)


def test_following_outlives_the_agents_absence_and_ends_with_its_caller(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        async with talking(running, admin, tmp_path / "m") as agent:
            (uid,) = agent.specs
            agent.logs[uid] = ["0", "1", "2", "3", "4"]
            await until(lambda: reported(admin, 1))
            following = Following(admin, tail_lines=2)
            await following.until_it_has("4")
        await until(lambda: truth(bool(following.notices)))
        assert following.notices == ["agent talker is away; its logs come when it is back"]
        assert (await texts(admin))[1] == ["agent talker is away; try again when it is back"]
        agent.logs[uid] += ["5", "6", "7"]
        async with agent.running():
            await following.until_it_has("7")
            assert [text for _, text in following.lines] == ["3", "4", "5", "6", "7"]
            assert agent.open_answers == 1
            await following.stop()
            await until(lambda: truth(agent.open_answers == 0))

    with_inside(tmp_path / "manager", body)


def test_following_outlives_the_manager_without_repeating_a_line(tmp_path: Path) -> None:
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            first = contextlib.AsyncExitStack()
            running = await first.enter_async_context(manager_inside(tmp_path / "manager"))
            client = await stack.enter_async_context(running.client())
            agent_stack = contextlib.AsyncExitStack()
            agent = await agent_stack.enter_async_context(talking(running, client, tmp_path / "m"))
            (uid,) = agent.specs
            agent.logs[uid] = [str(number) for number in range(10)]
            await until(lambda: reported(client, 1))
            following = Following(client, tail_lines=4)
            await following.until_it_has("9")
            await agent_stack.aclose()
            await first.aclose()
            agent.logs[uid] += ["10", "11"]
            port = int(running.address.rpartition(":")[2])
            await stack.enter_async_context(manager_inside(tmp_path / "manager", port))
            await stack.enter_async_context(agent.running())
            await following.until_it_has("11")
            assert [text for _, text in following.lines] == [str(number) for number in range(6, 12)]
            await following.stop()

    asyncio.run(run())


def test_a_reader_that_is_slow_holds_up_the_agent_and_nobody_else(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        async with talking(running, admin, tmp_path / "m") as agent:
            (uid,) = agent.specs
            # 64 MiB.
            agent.logs[uid] = ["x" * 16_000] * 4_200
            await until(lambda: reported(admin, 1))
            async with aclosing(admin.endpoints.logs("e", follow=True, tail_lines=0)) as chunks:
                await anext(chunks)
                before = -1
                while before != agent.sent_bytes:
                    before = agent.sent_bytes
                    await asyncio.sleep(0.3)
                    # The manager does its other work meanwhile.
                    await admin.endpoints.get("e")
                assert agent.sent_bytes < 32 * 2**20
            await until(lambda: truth(agent.open_answers == 0))

    with_inside(tmp_path / "manager", body)


def test_an_agent_answers_only_what_it_was_asked(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        async with talking(running, admin, tmp_path / "m") as agent:
            (uid,) = agent.specs
            await until(lambda: reported(admin, 1))
            following = Following(admin)
            await following.until_it_has(f"start of {uid}")
            token = await admin.admin.create_join_token(admin_pb2.JOIN_ROLE_AGENT)
            async with open_channel(running.address) as channel:
                stub: Any = fleet_pb2_grpc.FleetServiceStub(channel)
                joined = await stub.Join(fleet_pb2.JoinRequest(agent="liar"), metadata=bearer(token.token))

                async def lie() -> AsyncIterator[fleet_pb2.SendLogsRequest]:
                    for text in (b"", b"a lie"):
                        line = fleet_pb2.LogLine(time_ms=START_MS * 2, text=text)
                        yield fleet_pb2.SendLogsRequest(
                            request_id=agent.requests[-1].request_id, lines=[line]
                        )

                # Answered at once: nobody wants to hear it.
                await stub.SendLogs(lie(), metadata=bearer(joined.credential), timeout=5)
            agent.logs[uid].append("the truth")
            await following.until_it_has("the truth")
            assert all(text != "a lie" for _, text in following.lines)
            await following.stop()

    with_inside(tmp_path / "manager", body)


async def reported(client: Client, count: int) -> bool:
    """Whether the manager knows of so many kernels that run."""
    endpoint = await client.endpoints.get("e")
    return sum(bool(replica.pid) for replica in endpoint.replicas) == count


async def truth(value: bool) -> bool:
    return value
