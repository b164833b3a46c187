"""The HTTP port at which a program shows its metrics: GET /metrics, and GET /livez.

Nothing that a program is there for depends on it: while another program holds the port, this one works on
without and takes the port once it is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from dure.wire.prometheus import CONTENT_TYPE

log = logging.getLogger(__name__)

SHUTDOWN_S = 1.0
RETRY_S = 5.0


@contextlib.asynccontextmanager
async def serving(bind: str, port: int, render: Callable[[], Awaitable[str]]) -> AsyncIterator[None]:
    """Serves as long as it is held; port 0 serves nothing."""
    if not port:
        yield
        return

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=(await render()).encode(), headers={"Content-Type": CONTENT_TYPE})

    async def livez(_: web.Request) -> web.Response:
        return web.json_response({"status": "live"})

    application = web.Application()
    application.add_routes([web.get("/metrics", metrics), web.get("/livez", livez)])
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=SHUTDOWN_S, handle_signals=False)
    await runner.setup()
    waiting: asyncio.Task[None] | None = None
    try:
        if not await _listen(runner, bind, port):
            waiting = asyncio.create_task(_listen_later(runner, bind, port))
        yield
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait([waiting])
        await runner.cleanup()


async def _listen(runner: web.AppRunner, bind: str, port: int, *, quiet: bool = False) -> bool:
    site = web.TCPSite(runner, bind, port)
    try:
        await site.start()
    except OSError as error:
        await site.stop()
        if not quiet:
            log.warning(
                "cannot show metrics at %s:%d (%s); trying on: free the port, or choose another with "
                "--metrics-port, or 0 for none",
                bind,
                port,
                error.strerror or error,
            )
        return False
    return True


async def _listen_later(runner: web.AppRunner, bind: str, port: int) -> None:
    while True:
        await asyncio.sleep(RETRY_S)
        if await _listen(runner, bind, port, quiet=True):
            log.info("metrics are shown at %s:%d", bind, port)
            return
