"""Revisions take one another's place under load, and not one request fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from system.cluster import Cluster, load

from dure.client import Client
from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import CanaryStep, Endpoint, RolloutPolicy
from dure.wire.errors import DureError

SLOTS = {"cpu": "0.1", "mem": "96m"}
# Answers with the value of MODE; `bad` never comes up, `deaf` answers its health check with 500.
SERVER = """
import http.server, os, sys
mode = os.environ.get("MODE", "a")
if mode == "bad":
    print("cannot find the weights", flush=True)
    sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = mode.encode()
        self.send_response(500 if mode == "deaf" and self.path == "/health" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
DEFINITION = """
models:
  - name: mode
    model_path: /models
    service:
      start_command: [python, -u, server.py, "{port}"]
      port: 8000
      health_check: {path: /health, interval: 0.2, initial_delay: 0, max_wait_time: 5.0, max_retries: 5}
"""


async def served(client: Client, name: str, replicas: int, **fields: object) -> Endpoint:
    await client.endpoints.create(
        name,
        model="mode",
        replicas=replicas,
        resource_slots=SLOTS,
        environ={"MODE": "a"},
        open_to_public=True,
        **fields,  # type: ignore[arg-type]
    )
    return await client.endpoints.wait(name, timeout_s=60)


async def seen(
    client: Client, name: str, condition: Callable[[Endpoint], bool], timeout_s: float = 60
) -> Endpoint:
    """The endpoint as soon as it meets a condition."""
    newest = None
    try:
        async with asyncio.timeout(timeout_s):
            async for batch in client.endpoints.watch(name):
                for newest in batch.endpoints:
                    if condition(newest):
                        return newest
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s; the newest is {newest}") from None
    raise AssertionError("a watch does not end")


def answers(counts: dict[str, int]) -> None:
    assert set(counts) == {"200"}, counts
    assert counts["200"] > 50


@pytest.fixture(scope="module", autouse=True)
def mode(dure: Cluster) -> None:
    dure.model("mode", DEFINITION, SERVER)


def client_of(dure: Cluster) -> Client:
    return Client.from_context(dure.data_dir / "context.toml")


def test_rolling_and_back(dure: Cluster) -> None:
    async def run() -> None:
        async with client_of(dure) as client:
            before = await served(client, "rolling", 3)
            async with load(before.address) as counts:
                after = await client.endpoints.update("rolling", environ={"MODE": "b"})
                assert (after.revision, after.stable_revision) == (2, 1)
                done = await client.endpoints.wait("rolling", timeout_s=60, revision=2)
                assert {replica.revision for replica in done.replicas} == {2}
                await client.endpoints.rollback("rolling")
                done = await client.endpoints.wait("rolling", timeout_s=60, revision=1)
                assert (done.revision, done.stable_revision, done.resolved.environ["MODE"]) == (1, 1, "a")
            answers(counts)
            states = {revision.number: revision async for revision in client.endpoints.history("rolling")}
            assert "environ.MODE" in states[2].change
            assert states[1].state == endpoint_pb2.REVISION_STATE_CURRENT
            await client.endpoints.delete("rolling")

    asyncio.run(run())


@pytest.mark.parametrize(("how", "why"), [("bad", "cannot find the weights"), ("deaf", "500")])
def test_a_revision_that_does_not_come_up_is_rolled_back(dure: Cluster, how: str, why: str) -> None:
    async def run() -> None:
        async with client_of(dure) as client:
            before = await served(client, f"bad-{how}", 2)
            async with load(before.address) as counts:
                await client.endpoints.update(before.name, environ={"MODE": how})
                with pytest.raises(DureError, match=why):
                    await client.endpoints.wait(before.name, timeout_s=60, revision=2)
            answers(counts)
            after = await client.endpoints.wait(before.name, timeout_s=30)
            assert (after.revision, after.stable_revision) == (1, 1)
            assert {r.uid for r in after.replicas} == {r.uid for r in before.replicas}, "the old ones stayed"
            assert any(why in error for error in after.errors)
            failed = [item async for item in client.endpoints.history(before.name) if item.number == 2].pop()
            assert failed.state == endpoint_pb2.REVISION_STATE_FAILED
            assert why in failed.reason
            events = [event.reason async for event in client.endpoints.events(before.name)]
            assert "ROLLOUT_FAILED" in events
            await client.endpoints.delete(before.name)

    asyncio.run(run())


def test_blue_green_switches_at_once(dure: Cluster) -> None:
    async def run() -> None:
        policy = RolloutPolicy(strategy=endpoint_pb2.ROLLOUT_STRATEGY_BLUE_GREEN, manual_switch=True)
        async with client_of(dure) as client:
            before = await served(client, "bg", 2, rollout_policy=policy)
            async with load(before.address) as counts:
                await client.endpoints.update("bg", environ={"MODE": "b"})
                waiting = await seen(client, "bg", lambda endpoint: endpoint.rollout.waits)
                assert len(waiting.replicas) == 4
                assert await modes(before.address, 40) == {"a": 40}, "no traffic before the switch"
                await client.endpoints.resume_rollout("bg")
                await client.endpoints.wait("bg", timeout_s=60, revision=2)
                assert await modes(before.address, 40) == {"b": 40}
            answers(counts)
            await client.endpoints.delete("bg")

    asyncio.run(run())


def test_a_canary_gets_its_weight(dure: Cluster) -> None:
    async def run() -> None:
        steps = [CanaryStep(weight=10), CanaryStep(weight=40)]
        policy = RolloutPolicy(strategy=endpoint_pb2.ROLLOUT_STRATEGY_CANARY, steps=steps)
        async with client_of(dure) as client:
            before = await served(client, "canary", 2, rollout_policy=policy)
            async with load(before.address, workers=2) as counts:
                await client.endpoints.update("canary", environ={"MODE": "b"})
                await seen(client, "canary", lambda endpoint: endpoint.rollout.waits)
                found = await modes(before.address, 10_000)
                # One degree of freedom, 0.1%.
                assert chi_square(found, {"a": 9_000, "b": 1_000}) < 10.83, found
                await client.endpoints.resume_rollout("canary")
                await seen(
                    client, "canary", lambda endpoint: endpoint.rollout.waits and endpoint.rollout.step == 2
                )
                found = await modes(before.address, 1_000)
                assert chi_square(found, {"a": 600, "b": 400}) < 10.83, found
                await client.endpoints.pause_rollout("canary")
                paused = await client.endpoints.get("canary")
                assert paused.rollout.paused and "paused" in paused.rollout.detail
                await client.endpoints.resume_rollout("canary", full=True)
                done = await client.endpoints.wait("canary", timeout_s=60, revision=2)
                assert {replica.revision for replica in done.replicas} == {2}
            answers(counts)
            await client.endpoints.delete("canary")

    asyncio.run(run())


def test_an_agent_is_drained_and_one_is_killed_during_a_rollout(dure: Cluster) -> None:
    async def run() -> None:
        async with client_of(dure) as client:
            before = await served(client, "moving", 3)
            async with load(before.address) as counts:
                await client.endpoints.update("moving", environ={"MODE": "b"})
                await client.agents.drain("agent-1")
                done = await client.endpoints.wait("moving", timeout_s=60, revision=2)
                left = await seen(
                    client, "moving", lambda e: {replica.node for replica in e.replicas} == {"agent-2"}
                )
                assert len(left.replicas) == 3 and done.stable_revision == 2
                await client.agents.resume("agent-1")
                await client.endpoints.update("moving", environ={"MODE": "c"})
                dure.kill("agent-2")
                await asyncio.sleep(2)
                dure.start("agent", "--name", "agent-2")
                await client.endpoints.wait("moving", timeout_s=90, revision=3)
            answers(counts)
            await client.endpoints.delete("moving")
            await client.endpoints.wait_gone("moving", timeout_s=60)

    asyncio.run(run())


async def modes(address: str, count: int) -> dict[str, int]:
    """How many requests of so many each revision answers, by what they say."""
    import aiohttp

    found: dict[str, int] = {}
    left = iter(range(count))

    async def work(session: aiohttp.ClientSession) -> None:
        for _ in left:
            async with session.get(address) as response:
                assert response.status == 200
                text = await response.text()
                found[text] = found.get(text, 0) + 1

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(work(session) for _ in range(8)))
    return found


def chi_square(found: dict[str, int], expected: dict[str, int]) -> float:
    assert set(found) == set(expected), found
    return sum((found[key] - wanted) ** 2 / wanted for key, wanted in expected.items())
