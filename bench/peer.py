"""The peer: a reverse proxy as one writes it with aiohttp, server and ClientSession, a task per request.

`python -m bench.peer TARGET` prints the port that it listens on.
"""

from __future__ import annotations

import asyncio
import sys

import aiohttp
from aiohttp import web

HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host", "content-length"}


async def run(target: str) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:

        async def forward(request: web.Request) -> web.StreamResponse:
            headers = [(k, v) for k, v in request.headers.items() if k.lower() not in HOP]
            body = await request.read()
            async with session.request(
                request.method, target + request.raw_path, headers=headers, data=body
            ) as upstream:
                kept = [(k, v) for k, v in upstream.headers.items() if k.lower() not in HOP]
                response = web.StreamResponse(status=upstream.status)
                response.headers.extend(kept)
                response.content_length = upstream.content_length
                await response.prepare(request)
                async for data in upstream.content.iter_any():
                    await response.write(data)
                await response.write_eof()
                return response

        runner = web.ServerRunner(web.Server(forward))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        print(runner.addresses[0][1], flush=True)
        await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1]))
