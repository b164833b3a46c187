"""Logs of real sessions, asked for over the stream."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from agent_fakes import cluster, spec

from dure.agent.log_sender import READERS_MAX
from dure.fleet.v1 import fleet_pb2


def test_a_log_is_read_whole_and_its_last_lines_only(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            before_ms = time.time_ns() // 1_000_000
            fine = fleet_pb2.PreStartAction(log=fleet_pb2.Log(message="an action"))
            manager.want(spec("k1", "seq 1 2000; printf 'no end'; exit 3", pre_start_actions=[fine]))
            await manager.exited("k1")
            answer = manager.ask_log("k1")
            await manager.until(lambda: answer.complete)
            texts = [text.decode() for _, text in answer.lines]
            assert texts == ["an action", *map(str, range(1, 2001)), "no end"]
            times = [time_ms for time_ms, _ in answer.lines]
            assert times == sorted(times) and before_ms <= times[0] <= time.time_ns() // 1_000_000
            assert await manager.log_of("k1", tail_lines=2) == ["2000", "no end"]
            assert await manager.log_of("k1", max_age_ms=3_600_000, tail_lines=1) == ["no end"]
            await asyncio.sleep(0.05)
            assert await manager.log_of("k1", max_age_ms=1) == []
            # Following what has ended ends.
            assert (await manager.log_of("k1", follow=True))[-1] == "no end"

    asyncio.run(run())


def test_following_goes_on_until_the_session_is_removed(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            manager.want(
                spec("k1", "echo begun; trap 'echo bye; exit 0' TERM; while true; do sleep 0.1; done")
            )
            await manager.status("k1", lambda s: s.phase == fleet_pb2.KERNEL_PHASE_RUNNING)
            answer = manager.ask_log("k1", follow=True)
            await manager.until(lambda: [text for _, text in answer.lines] == [b"begun"])
            assert not answer.complete
            manager.unwant("k1")
            await manager.until(lambda: answer.complete)
            # Bash adds that its `sleep` was ended.
            assert [text for _, text in answer.lines][:: len(answer.lines) - 1] == [b"begun", b"bye"]
            await manager.gone("k1")
            # Its folder is gone, its log is not.
            assert not agent.kernel_folder("k1").exists()
            assert (await manager.log_of("k1"))[-1] == "bye"
            await agent.end(signal.SIGKILL)
            await agent.start()
            await manager.until(lambda: manager.complete_reports == 2)
            assert await manager.log_of("k1", tail_lines=1) == ["bye"]
            other = manager.ask_log("../k1")
            await manager.until(lambda: other.complete)
            assert "does not keep" in other.notices[0] and other.lines == []

    asyncio.run(run())


def test_what_is_written_while_no_agent_runs_is_there_and_bounded(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            flood = "echo first; until test -e $HOME/go; do sleep 0.05; done; seq -f %040.0f 1 800000; exit 3"
            manager.want(spec("k1", flood))
            await manager.status("k1", lambda s: s.phase == fleet_pb2.KERNEL_PHASE_RUNNING)
            await agent.end(signal.SIGKILL)
            (agent.kernel_folder("k1") / "home" / "go").touch()
            await manager.until(lambda: (agent.kernel_folder("k1") / "exit.json").exists())
            size = sum(path.stat().st_size for path in agent.kernel_folder("k1").glob("log*"))
            assert 8 * 2**20 < size < 17 * 2**20
            await agent.start()
            await manager.exited("k1")
            texts = await manager.log_of("k1")
            assert texts[-1] == f"{800000:040}" and len(texts) > 150_000
            assert texts == [f"{number:040}" for number in range(800001 - len(texts), 800001)]

    asyncio.run(run())


def test_a_reader_that_takes_nothing_holds_up_nobody(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            manager.want(spec("k1", "yes 'a line that is written without end' & exec python server.py"))
            await manager.healthy("k1")
            slow = [manager.ask_log("k1", follow=True) for _ in range(8)]
            for reader in slow:
                reader.may_take.clear()
            await manager.until(lambda: all(reader.begun for reader in slow))
            began = manager.heartbeats
            await manager.until(lambda: manager.heartbeats > began + 3)
            # What waits for it is what gRPC buffers, not the log.
            assert agent.process is not None
            status = Path(f"/proc/{agent.process.pid}/status").read_text()
            resident_kb = int(status.partition("VmRSS:")[2].split()[0])
            assert resident_kb < 200_000
            # One that does not follow comes to its end, however fast the session writes.
            whole = manager.ask_log("k1")
            await manager.until(lambda: whole.complete)
            assert whole.largest_bytes <= 256 * 1024
            for reader in slow:
                reader.enough = True
                reader.may_take.set()
            size = sum(path.stat().st_size for path in agent.kernel_folder("k1").glob("log*"))
            assert size < 18 * 2**20

    asyncio.run(run())


def test_readers_are_bounded_and_end_when_the_manager_has_enough(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            manager.want(spec("k1", "while true; do echo tick; sleep 0.1; done"))
            await manager.status("k1", lambda s: s.phase == fleet_pb2.KERNEL_PHASE_RUNNING)
            readers = [manager.ask_log("k1", follow=True) for _ in range(READERS_MAX)]
            await manager.until(lambda: all(reader.lines for reader in readers))
            refused = manager.ask_log("k1", follow=True)
            await manager.until(lambda: bool(refused.notices))
            assert "try again later" in refused.notices[0] and not refused.complete
            for reader in readers:
                reader.enough = True
            async with asyncio.timeout(40):
                # Each notices within half a second that nobody reads any more.
                while True:
                    more = manager.ask_log("k1", tail_lines=1)
                    await manager.until(lambda more=more: bool(more.lines or more.notices))
                    if more.lines:
                        break

    asyncio.run(run())


def test_garbage_is_sent_as_it_is(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            data = bytes(byte for byte in range(256) if byte not in b"\r\n") * 100
            (manager.storage / "folder-1" / "garbage").write_bytes(data)
            manager.want(spec("k1", "cat garbage; echo; exit 0"))
            await manager.exited("k1")
            answer = manager.ask_log("k1")
            await manager.until(lambda: answer.complete)
            assert b"".join(text for _, text in answer.lines) == data
            assert os.stat(agent.kernel_folder("k1") / "log").st_mode & 0o077 == 0

    asyncio.run(run())
