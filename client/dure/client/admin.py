"""Calls for those who run the cluster."""

from __future__ import annotations

from dure.client.call import Caller
from dure.v1 import admin_pb2, admin_pb2_grpc


class AdminGroup:
    """`client.admin`."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller
        self._stub = admin_pb2_grpc.AdminServiceStub(caller.channel)

    async def get_cluster(self) -> admin_pb2.GetClusterResponse:
        return await self._caller.unary(self._stub.GetCluster, admin_pb2.GetClusterRequest())

    async def create_join_token(
        self, role: admin_pb2.JoinRole.ValueType, ttl_s: float | None = None
    ) -> admin_pb2.CreateJoinTokenResponse:
        """`ttl_s` None leaves it to the manager (an hour)."""
        request = admin_pb2.CreateJoinTokenRequest(role=role)
        if ttl_s is not None:
            request.ttl.FromNanoseconds(round(ttl_s * 1e9))
        # A second token does no harm: an unused one expires.
        return await self._caller.unary(self._stub.CreateJoinToken, request)
