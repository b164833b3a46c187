"""Getting at an endpoint to chat with it: wait until it serves, and hold a token for as long as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from datetime import timedelta

from dure.client.client import Client
from dure.client.waiting import Verdict, summary
from dure.v1 import endpoint_pb2
from dure.v1.endpoint_pb2 import Endpoint
from dure.v1.token_pb2 import Token
from dure.wire.errors import DureError, NotFound, TimedOut

TOKEN_LIFE = timedelta(hours=1)
# A token that is this old is replaced before the next question, so that it outlives the answer.
RENEW_AFTER_S = 1800.0
TOKEN_LABEL = "dure chat"
REVOKE_WAIT_S = 5.0


def judge_serving(endpoint: Endpoint) -> Verdict:
    """Whether `endpoint` answers requests now, or will not by itself."""
    name = _short(endpoint.name)
    match endpoint.status:
        case endpoint_pb2.ENDPOINT_STATUS_TERMINATING:
            return Verdict(failed=f"endpoint {name} is being deleted", reason="CHAT_NO_ENDPOINT")
        case endpoint_pb2.ENDPOINT_STATUS_STOPPED:
            return Verdict(
                failed=f"endpoint {name} is stopped: zero replicas are wanted", reason="CHAT_STOPPED"
            )
        case endpoint_pb2.ENDPOINT_STATUS_IDLE:
            return Verdict(done=bool(endpoint.address))  # a request wakes it
    if endpoint.ready_replicas and endpoint.address:
        return Verdict(done=True)
    if endpoint.status == endpoint_pb2.ENDPOINT_STATUS_BLOCKED:
        why = endpoint.status_reason or "too many failures in a row"
        return Verdict(failed=f"endpoint {name} is BLOCKED: {why}")
    return Verdict()


class EndpointAccess:
    """One endpoint, and a token of its own for it unless it is open to the public. `close` revokes that."""

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._name = name
        self._public = False
        self._token: Token | None = None
        self._issued_s = 0.0
        self._issuing: asyncio.Task[Token] | None = None

    async def wait(self, timeout_s: float, notify: Callable[[Endpoint], None]) -> Endpoint:
        """Returns once a replica serves. Raises DureError with the reason why none will, or TimedOut."""
        full = self._client.endpoints.full_name(self._name)
        newest: Endpoint | None = None
        try:
            async with (
                asyncio.timeout(timeout_s),
                aclosing(self._client.endpoints.watch(self._name)) as batches,
            ):
                async for batch in batches:
                    for newest in batch.endpoints:
                        notify(newest)
                        verdict = judge_serving(newest)
                        if verdict.failed:
                            raise DureError(verdict.failed, reason=verdict.reason)
                        if verdict.done:
                            self._public = newest.open_to_public
                            return newest
                    if full in batch.removed or (batch.synced and newest is None):
                        raise NotFound(f"endpoint {_short(full)} is gone")
        except TimeoutError:
            state = f": {summary(newest)}" if newest is not None else ""
            if newest is not None and newest.ready_replicas and not newest.address:
                state = ": it has no address, since no proxy has joined"
            raise TimedOut(
                f"no replica of endpoint {_short(full)} is healthy after {timeout_s:g} s{state}",
                reason="WAIT_TIMED_OUT",
            ) from None
        raise AssertionError("a watch does not end")

    async def token(self) -> str:
        """A token that works for a while; empty where none is needed."""
        if self._public:
            return ""
        clock = asyncio.get_running_loop().time
        if self._token is None or clock() - self._issued_s > RENEW_AFTER_S:
            old, self._issued_s = self._token, clock()
            self._issuing = asyncio.create_task(
                self._client.tokens.create(self._name, TOKEN_LIFE, TOKEN_LABEL)
            )
            # Who stops waiting for it must not lose it: `close` revokes what may have been issued meanwhile.
            self._token = await asyncio.shield(self._issuing)
            if old is not None:
                await self._client.tokens.revoke(old.name)
        return self._token.secret

    async def close(self) -> str:
        """Revokes the token; returns a sentence if that did not work."""
        if self._issuing is None:
            return ""
        try:
            async with asyncio.timeout(REVOKE_WAIT_S):
                issued = await self._issuing
                await self._client.tokens.revoke(issued.name)
        except NotFound:
            return ""  # it went with its endpoint
        except (DureError, TimeoutError) as error:
            if self._token is None:
                return ""
            hours = TOKEN_LIFE.total_seconds() / 3600
            why = str(error) or "the manager did not answer in time"
            return f"the token of this chat was not revoked ({why}); it ends by itself within {hours:g} h"
        finally:
            self._issuing = None
        return ""


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1]
