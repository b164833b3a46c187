"""Calls about the tokens of an endpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta

from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.v1 import token_pb2, token_pb2_grpc
from dure.wire import names


class TokenGroup:
    """`client.tokens`."""

    def __init__(self, caller: Caller, project: str) -> None:
        self._caller = caller
        self._project = project
        self._stub = token_pb2_grpc.TokenServiceStub(caller.channel)

    async def create(self, endpoint: str, expires: datetime | timedelta, label: str = "") -> token_pb2.Token:
        """`expires`: a moment (with a time zone), or how long from now by the manager's clock."""
        request = token_pb2.CreateTokenRequest(parent=self._endpoint(endpoint), label=label)
        if isinstance(expires, timedelta):
            request.ttl.FromTimedelta(expires)
        else:
            request.expire_time.FromDatetime(expires)
        response = await self._caller.unary(self._stub.CreateToken, request, idempotent=False)
        return response.token

    async def get(self, name: str, endpoint: str | None = None) -> token_pb2.Token:
        """With its secret. `name` is the full name, or the uid beside `endpoint`."""
        request = token_pb2.GetTokenRequest(name=self._name(name, endpoint))
        return (await self._caller.unary(self._stub.GetToken, request)).token

    def list(self, endpoint: str) -> AsyncIterator[token_pb2.Token]:
        async def fetch(token: str) -> tuple[list[token_pb2.Token], str]:
            request = token_pb2.ListTokensRequest(
                parent=self._endpoint(endpoint), page_size=PAGE_SIZE, page_token=token
            )
            page = await self._caller.unary(self._stub.ListTokens, request)
            return [*page.tokens], page.next_page_token

        return all_pages(fetch)

    async def revoke(self, name: str, endpoint: str | None = None) -> token_pb2.Token:
        request = token_pb2.RevokeTokenRequest(name=self._name(name, endpoint))
        return (await self._caller.unary(self._stub.RevokeToken, request)).token

    def _endpoint(self, endpoint: str) -> str:
        return endpoint if "/" in endpoint else names.endpoint(self._project, endpoint)

    def _name(self, name: str, endpoint: str | None) -> str:
        return name if "/" in name or endpoint is None else f"{self._endpoint(endpoint)}/tokens/{name}"
