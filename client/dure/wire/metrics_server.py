"""The HTTP port at which a program shows its metrics: GET /metrics, and GET /livez."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web

from dure.wire.prometheus import CONTENT_TYPE

SHUTDOWN_S = 1.0


@contextlib.asynccontextmanager
async def serving(bind: str, port: int, render: Callable[[], Awaitable[str]]) -> AsyncIterator[None]:
    """Serves as long as it is held; port 0 serves nothing. Raises OSError with a sentence."""
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
    try:
        try:
            await web.TCPSite(runner, bind, port).start()
        except OSError as error:
            raise OSError(
                f"cannot show metrics at {bind}:{port} ({error.strerror or error}): free the port, choose "
                "another with --metrics-port, or 0 for none"
            ) from error
        yield
    finally:
        await runner.cleanup()
