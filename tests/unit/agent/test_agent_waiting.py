"""Waiting for descriptors."""

from __future__ import annotations

import asyncio
import os

from dure.agent.waiting import readable


def test_several_may_wait_for_one_descriptor() -> None:
    async def run() -> None:
        reading, writing = os.pipe()
        try:
            first = asyncio.create_task(readable([reading]))
            second = asyncio.create_task(readable([reading], 5))
            assert not await readable([reading], 0.01)
            os.write(writing, b"x")
            async with asyncio.timeout(5):
                assert await first and await second
            assert await readable([reading], 0.01)
        finally:
            os.close(reading)
            os.close(writing)

    asyncio.run(run())
