"""Calls about agents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.v1 import agent_pb2, agent_pb2_grpc
from dure.wire import names
from dure.wire.errors import TimedOut


class AgentGroup:
    """`client.agents`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = agent_pb2_grpc.AgentServiceStub(caller.channel)

    async def get(self, name: str) -> agent_pb2.Agent:
        request = agent_pb2.GetAgentRequest(name=_full(name))
        return (await self._caller.unary(self._stub.GetAgent, request)).agent

    async def drain(self, name: str) -> agent_pb2.Agent:
        """No new sessions for it; those that it has move to others, without a failed request."""
        request = agent_pb2.DrainAgentRequest(name=_full(name))
        return (await self._caller.unary(self._stub.DrainAgent, request)).agent

    async def resume(self, name: str) -> agent_pb2.Agent:
        """Takes it back into use."""
        request = agent_pb2.ResumeAgentRequest(name=_full(name))
        return (await self._caller.unary(self._stub.ResumeAgent, request)).agent

    async def wait_empty(self, name: str, *, timeout_s: float, poll_s: float = 0.5) -> agent_pb2.Agent:
        """Returns when no session is left on it. Raises TimedOut."""
        item = await self.get(name)
        try:
            async with asyncio.timeout(timeout_s):
                while item.session_count:
                    await asyncio.sleep(poll_s)
                    item = await self.get(name)
        except TimeoutError:
            raise TimedOut(
                f"agent {name} still has {item.session_count} session(s) after {timeout_s:g} s; "
                "they move once their successors are healthy",
                reason="DRAIN_TIMED_OUT",
            ) from None
        return item

    def list(self) -> AsyncIterator[agent_pb2.Agent]:
        async def fetch(token: str) -> tuple[list[agent_pb2.Agent], str]:
            request = agent_pb2.ListAgentsRequest(page_size=PAGE_SIZE, page_token=token)
            page = await self._caller.unary(self._stub.ListAgents, request)
            return [*page.agents], page.next_page_token

        return all_pages(fetch)


def _full(name: str) -> str:
    return name if "/" in name else names.agent(name)
