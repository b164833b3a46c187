"""Validation: a dry run, a real session with its events and logs, and nothing left of it afterwards."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
from system.cluster import Cluster, until

from dure.client import Client
from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import ValidateEndpointResponse
from dure.wire.errors import InvalidInput

SLOTS = {"cpu": "0.1", "mem": "96m"}
SERVER = """
import http.server, os, sys, time
print("loading the weights of", os.environ.get("MODE"), flush=True)
if os.environ.get("MODE") == "bad":
    sys.exit("there are no weights")
if os.environ.get("MODE") == "slow":
    time.sleep(600)
class Handler(http.server.SimpleHTTPRequestHandler):
    pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
DEFINITION = """
models:
  - name: v
    model_path: /models
    service:
      start_command: [python, -u, server.py, "{port}"]
      port: 8000
      health_check: {path: /, interval: 0.3, initial_delay: 0}
"""


@pytest.fixture(scope="module", autouse=True)
def model(dure: Cluster) -> None:
    dure.model("v", DEFINITION, SERVER)


def client_of(dure: Cluster) -> Client:
    return Client.from_context(dure.data_dir / "context.toml")


async def validated(dure: Cluster, how: str, **fields: object) -> list[ValidateEndpointResponse]:
    async with client_of(dure) as client:
        pieces = client.endpoints.validate(
            model="v",
            resource_slots=SLOTS,
            environ={"MODE": how},
            **fields,  # type: ignore[arg-type]
        )
        return [piece async for piece in pieces]


def logs(pieces: list[ValidateEndpointResponse]) -> str:
    return "\n".join(line.text for piece in pieces for line in piece.log.lines)


def sessions(dure: Cluster) -> int:
    """Sessions that agents hold, by what they say themselves."""

    async def count() -> int:
        async with client_of(dure) as client:
            return sum([agent.session_count async for agent in client.agents.list()])

    return asyncio.run(count())


def nothing_left(dure: Cluster, before: int) -> None:
    until(lambda: sessions(dure) == before, 20, "the session is removed")
    assert "validation" not in dure.dure("endpoint", "list")


def test_a_good_one_finishes_healthy_and_is_removed(dure: Cluster) -> None:
    before = sessions(dure)
    pieces = asyncio.run(validated(dure, "good"))
    outcome = pieces[-1].outcome
    assert outcome.result == endpoint_pb2.VALIDATION_RESULT_FINISHED
    assert outcome.health == endpoint_pb2.HEALTH_HEALTHY
    events = [piece.event.reason for piece in pieces if piece.HasField("event")]
    assert {"VALIDATION_CHECKED", "REPLICA_PLACED", "REPLICA_HEALTHY"} <= set(events)
    assert "loading the weights of good" in logs(pieces)
    nothing_left(dure, before)


def test_a_bad_one_says_why(dure: Cluster) -> None:
    before = sessions(dure)
    pieces = asyncio.run(validated(dure, "bad"))
    assert pieces[-1].outcome.result == endpoint_pb2.VALIDATION_RESULT_FAILED
    assert "there are no weights" in pieces[-1].outcome.detail
    assert "there are no weights" in logs(pieces)
    nothing_left(dure, before)


def test_a_slow_one_times_out(dure: Cluster) -> None:
    before = sessions(dure)
    pieces = asyncio.run(validated(dure, "slow", timeout_s=4.0))
    assert pieces[-1].outcome.result == endpoint_pb2.VALIDATION_RESULT_TIMED_OUT
    assert "not healthy within 4 s" in pieces[-1].outcome.detail
    nothing_left(dure, before)


def test_a_dry_run_starts_nothing_and_says_where_it_would_start(dure: Cluster) -> None:
    pieces = asyncio.run(validated(dure, "good", dry_run=True))
    assert pieces[-1].outcome.result == endpoint_pb2.VALIDATION_RESULT_FINISHED
    assert "would start on agent-" in " ".join(piece.event.message for piece in pieces)
    assert not any(piece.event.reason == "REPLICA_PLACED" for piece in pieces)

    async def too_large() -> list[ValidateEndpointResponse]:
        async with client_of(dure) as client:
            slots = {"cpu": "1000", "mem": "96m"}
            pieces = client.endpoints.validate(model="v", resource_slots=slots, dry_run=True)
            return [piece async for piece in pieces]

    pieces = asyncio.run(too_large())
    assert pieces[-1].outcome.result == endpoint_pb2.VALIDATION_RESULT_FAILED
    assert "cpu" in pieces[-1].outcome.detail


def test_all_errors_of_the_files_come_at_once(dure: Cluster, tmp_path: Path) -> None:
    bad = DEFINITION.replace("port: 8000", "port: 80000").replace("interval:", "intervall:")
    dure.model("v-bad", bad, SERVER)

    async def run() -> None:
        async with client_of(dure) as client:
            with pytest.raises(InvalidInput) as raised:
                async for _ in client.endpoints.validate(model="v-bad", dry_run=True):
                    pass
            told = "\n".join(str(violation) for violation in raised.value.violations)
            assert "intervall" in told and "80000" in told

    asyncio.run(run())


def test_who_goes_away_leaves_nothing_behind(dure: Cluster) -> None:
    before = sessions(dure)

    async def leave() -> None:
        async with client_of(dure) as client:
            pieces = client.endpoints.validate(model="v", resource_slots=SLOTS, environ={"MODE": "slow"})
            async with aclosing(pieces) as stream:
                async for piece in stream:
                    if piece.HasField("log"):
                        return

    asyncio.run(leave())
    nothing_left(dure, before)


def test_a_manager_that_died_leaves_nothing_behind(dure: Cluster) -> None:
    before = sessions(dure)

    async def run() -> None:
        async with client_of(dure) as client:
            pieces = client.endpoints.validate(model="v", resource_slots=SLOTS, environ={"MODE": "slow"})
            async with aclosing(pieces) as stream:
                async for piece in stream:
                    if piece.HasField("log"):
                        dure.kill("manager")
                        return

    asyncio.run(run())
    dure.start("manager")
    dure.dure("doctor", "--wait", "30")
    nothing_left(dure, before)
