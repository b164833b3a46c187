"""Logs of containers: all that was written, once, whatever breaks in between."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from containers import wire
from containers.nodes import kernel, node

COUNT = 4000
COUNTING = f"""
import sys, time
for number in range({COUNT}):
    print(number, file=(sys.stdout, sys.stderr)[number % 3 == 0], flush=True)
    if number % 10 == 0:
        time.sleep(0.012)
"""
FLOOD = "import sys; sys.stdout.write(''.join(f'{n:07}' + 'x' * 90 + chr(10) for n in range(100_000)))"
SLOW = "echo 1; sleep 0.4; echo 2; until [ -e /home/work/go ]; do sleep 0.1; done; echo 3"
LONG = "import sys; sys.stdout.write('a' * 40_000 + chr(10) + 'end'); sys.stdout.flush()"


def test_everything_is_copied_once_over_breaks_and_restarts(tmp_path: Path) -> None:
    async def run() -> None:
        async with (
            wire.between(tmp_path / "engine.sock") as line,
            node(tmp_path, engine=line.url) as (
                manager,
                agent,
            ),
        ):
            (manager.storage / "folder-1" / "count.py").write_text(COUNTING)
            manager.want(kernel("k1", ["python", "count.py"], health_check=None))
            log = agent.kernel_folder("k1") / "log"

            async def copied(lines: int) -> None:
                await manager.until(lambda: log.exists() and log.read_bytes().count(b"\n") > lines)

            await copied(200)
            await line.cut()
            await copied(900)
            await line.close()
            await asyncio.sleep(0.3)
            await line.open()
            await copied(1700)
            await agent.end(signal.SIGKILL)
            await asyncio.sleep(0.3)
            await agent.start()
            await copied(2600)
            await agent.end(signal.SIGTERM)
            # It ends while no agent is there.
            await asyncio.sleep(3.0)
            await agent.start()
            assert (await manager.exited("k1")).exit.code == 0
            await copied(COUNT - 1)
            numbers = [int(text) for text in await manager.log_of("k1")]
            # Each of the two streams is in order, and between them nothing is lost or told twice.
            assert sorted(numbers) == list(range(COUNT))
            for stream in ([n for n in numbers if n % 3 == 0], [n for n in numbers if n % 3]):
                assert stream == sorted(stream)

    asyncio.run(run())


def test_following_long_lines_and_floods(tmp_path: Path) -> None:
    async def run() -> None:
        async with node(tmp_path) as (manager, agent):
            manager.want(
                kernel("slow", SLOW, health_check=None),
                kernel("long", ["python", "-c", LONG], health_check=None),
                kernel("flood", ["python", "-c", FLOOD], health_check=None),
            )
            await manager.until(lambda: "slow" in manager.statuses)
            following = manager.ask_log("slow", follow=True)
            await manager.until(lambda: following.lines != [])
            assert not following.complete
            (agent.kernel_folder("slow") / "home" / "go").touch()
            await manager.until(lambda: following.complete)
            assert [text for _, text in following.lines] == [b"1", b"2", b"3"]
            times = [time_ms for time_ms, _ in following.lines]
            assert times[1] - times[0] > 300, "each line has the time at which it was written"

            await manager.exited("long")
            lines = await manager.log_of("long")
            assert "".join(lines[:-1]) == "a" * 40_000 and lines[-1] == "end"
            assert max(map(len, lines)) <= 16 * 1024

            ended = await manager.exited("flood")
            assert ended.exit.code == 0 and ended.exit.log_tail.endswith("x\n")
            # An end is told a few seconds later at most, copied or not.
            log = agent.kernel_folder("flood") / "log"
            await manager.until(lambda: b" 0099999x" in log.read_bytes()[-200:])
            numbers = [int(text[:7]) for text in await manager.log_of("flood") if text[:1].isdigit()]
            # Its newest part is kept, whole.
            assert numbers == list(range(numbers[0], 100_000)) and len(numbers) > 50_000

    asyncio.run(run())
