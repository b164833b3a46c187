"""Calls about the tokens of an endpoint."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime, timedelta

from dure.client.call import PAGE_SIZE, Caller, all_pages
from dure.v1 import token_pb2, token_pb2_grpc
from dure.wire import names
from dure.wire.errors import InvalidInput, NotFound, Violation

# Events show the last six characters of a uid.
_UID_END_LENGTH_MIN = 6
_SHOWN_MAX = 10


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

    async def find(self, endpoint: str, which: str) -> token_pb2.Token:
        """Without its secret: the token of this uid, of the uid that ends so (six characters at least), or of
        this label, where one that works goes before those that do not.

        Raises NotFound, or InvalidInput if several fit.
        """
        found = [token async for token in self.list(endpoint) if _fits(token, which)]
        working = [token for token in found if token.status == token_pb2.TOKEN_STATUS_ACTIVE]
        fitting = [token for token in found if token.uid == which] or working or found
        if not fitting:
            name = endpoint.rsplit("/", 1)[-1]
            raise NotFound(f"endpoint {name} has no token `{which}`", reason="TOKEN_NOT_FOUND")
        if len(fitting) > 1:
            uids = ", ".join(token.uid for token in fitting[:_SHOWN_MAX])
            more = " and more" if len(fitting) > _SHOWN_MAX else ""
            what = f"`{which}` fits {len(fitting)} tokens, so name one by its id: {uids}{more}"
            raise InvalidInput.of([Violation("token", what)])
        return fitting[0]

    async def revoke(self, name: str, endpoint: str | None = None) -> token_pb2.Token:
        request = token_pb2.RevokeTokenRequest(name=self._name(name, endpoint))
        return (await self._caller.unary(self._stub.RevokeToken, request)).token

    def _endpoint(self, endpoint: str) -> str:
        return endpoint if "/" in endpoint else names.endpoint(self._project, endpoint)

    def _name(self, name: str, endpoint: str | None) -> str:
        return name if "/" in name or endpoint is None else f"{self._endpoint(endpoint)}/tokens/{name}"


def _fits(token: token_pb2.Token, which: str) -> bool:
    ends = len(which) >= _UID_END_LENGTH_MIN and token.uid.endswith(which.lower())
    return ends or (bool(which) and token.label == which)
