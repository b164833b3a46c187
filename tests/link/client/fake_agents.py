"""The fake manager's AgentService and AdminService."""

from __future__ import annotations

from typing import Any

from link.client.fake_state import FakeManager, page, refuses

from dure.v1 import admin_pb2, admin_pb2_grpc, agent_pb2, agent_pb2_grpc
from dure.wire.errors import NotFound


class Agents(agent_pb2_grpc.AgentServiceServicer):
    def __init__(self, fake: FakeManager) -> None:
        self.fake = fake

    def find(self, name: str) -> agent_pb2.Agent:
        for agent in self.fake.agents:
            if agent.name == name:
                return agent
        raise NotFound(f"there is no agent `{name.rsplit('/', 1)[-1]}`")

    @refuses
    async def GetAgent(self, request: Any, context: Any) -> agent_pb2.GetAgentResponse:
        self.fake.called("GetAgent")
        return agent_pb2.GetAgentResponse(agent=self.find(request.name))

    @refuses
    async def DrainAgent(self, request: Any, context: Any) -> agent_pb2.DrainAgentResponse:
        agent = self.find(request.name)
        agent.draining = True
        return agent_pb2.DrainAgentResponse(agent=agent)

    @refuses
    async def ResumeAgent(self, request: Any, context: Any) -> agent_pb2.ResumeAgentResponse:
        agent = self.find(request.name)
        agent.draining = False
        return agent_pb2.ResumeAgentResponse(agent=agent)

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
