"""Logs on their way from agents to those who read them.

A request goes out on the agent's stream, and the agent answers with a call of SendLogs. Between that call
and the reader is a short queue: a slow reader holds up the call, gRPC the agent, and nothing piles up.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

import grpc.aio

from dure.fleet.v1 import fleet_pb2
from dure.manager.fleet import Fleet
from dure.wire import errors

MESSAGES_MAX = 4
ANSWER_WAIT_S = 10.0
READINGS_MAX = 4096


class AgentAway(Exception):
    """The agent is not connected, or was lost in the middle of its answer."""


class _Reading:
    """One log under way. `complete` is set when the agent has sent all of it."""

    def __init__(self, agent_uid: str) -> None:
        self.agent_uid = agent_uid
        self.begun = asyncio.Event()
        self.closed = asyncio.Event()
        self.complete = False
        self._ended = False
        self._messages: deque[fleet_pb2.SendLogsRequest] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()

    async def put(self, message: fleet_pb2.SendLogsRequest) -> None:
        while len(self._messages) >= MESSAGES_MAX:
            self._room.clear()
            await self._room.wait()
        self._messages.append(message)
        self._changed.set()

    async def get(self) -> fleet_pb2.SendLogsRequest | None:
        """None at the end."""
        while not self._messages:
            if self._ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        self._room.set()
        return self._messages.popleft()

    def end(self) -> None:
        self._ended = True
        self._changed.set()


class LogRelay:
    """Pairs requests for logs with the answers of agents."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._readings: dict[str, _Reading] = {}

    async def read(
        self, agent_uid: str, request: fleet_pb2.LogRequest
    ) -> AsyncGenerator[fleet_pb2.SendLogsRequest, None]:
        """What the agent answers; `request` needs no id. Raises AgentAway. Close it when leaving it early."""
        if len(self._readings) >= READINGS_MAX:
            raise errors.ResourceExhausted(f"{READINGS_MAX} logs are being read; close some")
        request.request_id = secrets.token_hex(8)
        reading = self._readings[request.request_id] = _Reading(agent_uid)
        try:
            if not self._fleet.ask(agent_uid, fleet_pb2.ConnectResponse(log_request=request)):
                raise AgentAway
            try:
                async with asyncio.timeout(ANSWER_WAIT_S):
                    await reading.begun.wait()
            except TimeoutError as error:
                raise AgentAway from error
            while (message := await reading.get()) is not None:
                yield message
            if not reading.complete:
                raise AgentAway
        finally:
            reading.closed.set()
            del self._readings[request.request_id]

    async def take(self, agent_uid: str, context: Any) -> None:
        """Passes on what an agent sends in a call of SendLogs, until it or the reader has had enough."""
        async with asyncio.timeout(ANSWER_WAIT_S):
            first = await context.read()
        if first is grpc.aio.EOF:
            raise errors.InvalidInput("a call of SendLogs begins with the id of the request that it answers")
        reading = self._readings.get(first.request_id)
        # An agent answers what it was asked itself, nothing else; a reader may be gone by now.
        if reading is None or reading.agent_uid != agent_uid or reading.begun.is_set():
            return
        reading.begun.set()
        passing = asyncio.create_task(_pass_on(first, context, reading))
        closed = asyncio.create_task(reading.closed.wait())
        try:
            await asyncio.wait({passing, closed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (passing, closed):
                task.cancel()
            await asyncio.gather(passing, closed, return_exceptions=True)
            reading.end()


async def _pass_on(first: Any, context: Any, reading: _Reading) -> None:
    message = first
    while message is not grpc.aio.EOF:
        if message.lines or message.notice:
            await reading.put(message)
        # The end of a call alone says nothing: one that was broken off ends too.
        reading.complete = reading.complete or message.complete
        message = await context.read()
