"""One call to the manager: its deadline, its retries, its errors."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Protocol, TypeVar

import grpc
import grpc.aio

from dure.wire.backoff import backoff_s
from dure.wire.channel import bearer, open_channel
from dure.wire.errors import DureError, ManagerUnreachable, TimedOut, Unauthenticated, from_rpc

Request = TypeVar("Request")
Response = TypeVar("Response")
RequestIn = TypeVar("RequestIn", contravariant=True)
ResponseOut = TypeVar("ResponseOut", covariant=True)
Item = TypeVar("Item")

PAGE_SIZE = 500


class _Method(Protocol[RequestIn, ResponseOut]):
    def __call__(
        self,
        request: RequestIn,
        /,
        *,
        timeout: float | None = None,
        metadata: grpc.aio.Metadata | None = None,
    ) -> Awaitable[ResponseOut]: ...


class Caller:
    """A channel to the manager, and how calls on it are made.

    `timeout_s` bounds a call. While the manager is out of reach a call waits up to `retry_s` for it; what is
    safe to repeat is repeated within the same time.
    """

    def __init__(self, address: str, api_key: str, *, timeout_s: float, retry_s: float) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self.retry_s = retry_s
        if not (api_key.isascii() and api_key.isprintable()):
            raise Unauthenticated("the API key has characters that no API key has")
        self.metadata = grpc.aio.Metadata(*bearer(api_key))
        self.channel = open_channel(address)

    async def close(self) -> None:
        await self.channel.close()

    async def unary(
        self,
        method: _Method[Request, Response],
        request: Request,
        *,
        idempotent: bool = True,
        timeout_s: float | None = None,
    ) -> Response:
        """The answer. Raises errors of `dure.wire.errors` only."""

        async def once() -> Response:
            return await method(request, timeout=timeout_s or self.timeout_s, metadata=self.metadata)

        return await self.repeat(once, idempotent=idempotent)

    async def repeat(self, once: Callable[[], Awaitable[Response]], *, idempotent: bool = True) -> Response:
        """Runs `once`, again after UNAVAILABLE if it is idempotent and time is left; maps its errors."""
        end = asyncio.get_running_loop().time() + self.retry_s
        attempt = 0
        while True:
            attempt += 1
            # A call that was never sent can be repeated whatever it does: so send it on a live connection.
            await self.connect(end - asyncio.get_running_loop().time())
            try:
                return await once()
            except grpc.aio.AioRpcError as error:
                translated = self.translate(error)
                pause_s = backoff_s(attempt, first_s=0.1, max_s=1.0, jitter=random.random())
                left_s = end - asyncio.get_running_loop().time()
                if not (isinstance(translated, ManagerUnreachable) and idempotent and left_s > pause_s):
                    raise translated from None
            await asyncio.sleep(pause_s)

    async def connect(self, within_s: float) -> None:
        """Returns once the connection is up. Raises ManagerUnreachable when it is not within the time."""
        try:
            async with asyncio.timeout(max(within_s, 0.05)):
                while (
                    state := self.channel.get_state(try_to_connect=True)
                ) is not grpc.ChannelConnectivity.READY:
                    await self.channel.wait_for_state_change(state)
        except TimeoutError:
            raise ManagerUnreachable(f"no manager answers at {self.address}") from None

    def translate(self, error: grpc.aio.AioRpcError) -> DureError:
        """The error of our tree; what gRPC itself says is put into a sentence."""
        translated = from_rpc(error)
        if (
            isinstance(translated, ManagerUnreachable)
            and translated.reason == ManagerUnreachable.default_reason
        ):
            return ManagerUnreachable(f"no manager answers at {self.address} ({error.details()})")
        if isinstance(translated, TimedOut) and translated.reason == TimedOut.default_reason:
            return TimedOut(f"the manager at {self.address} did not answer in time")
        return translated


async def all_pages(fetch: Callable[[str], Awaitable[tuple[list[Item], str]]]) -> AsyncGenerator[Item, None]:
    """Every item of every page; `fetch` takes a page token and returns a page and the next token."""
    token = ""
    while True:
        items, token = await fetch(token)
        for item in items:
            yield item
        if not token:
            return
