"""Calls about agents."""

from __future__ import annotations

from collections.abc import AsyncIterator

from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.v1 import agent_pb2, agent_pb2_grpc
from dure.wire import names


class AgentGroup:
    """`client.agents`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = agent_pb2_grpc.AgentServiceStub(caller.channel)

    async def get(self, name: str) -> agent_pb2.Agent:
        full = name if "/" in name else names.agent(name)
        response = await self._caller.unary(self._stub.GetAgent, agent_pb2.GetAgentRequest(name=full))
        return response.agent

    def list(self) -> AsyncIterator[agent_pb2.Agent]:
        async def fetch(token: str) -> tuple[list[agent_pb2.Agent], str]:
            request = agent_pb2.ListAgentsRequest(page_size=PAGE_SIZE, page_token=token)
            page = await self._caller.unary(self._stub.ListAgents, request)
            return [*page.agents], page.next_page_token

        return all_pages(fetch)
