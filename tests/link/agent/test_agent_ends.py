"""How kernels end: crashes, memory, floods, actions, escapees, signals to the agent."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path

import pytest
from agent_fakes import alive, cluster, processes_of, spec
from own_ports import free_port

from dure.fleet.v1 import fleet_pb2

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs cgroups and mount namespaces")


def action(ref: str = "", **content) -> fleet_pb2.PreStartAction:
    return fleet_pb2.PreStartAction(ref=ref, **content)


def test_exit_codes_signals_and_log_tail(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            manager.want(
                spec("code", "echo to stdout; echo the last words >&2; exit 42"),
                spec("signal", "kill -SEGV $$"),
                spec("missing", ["/no/such/program"]),
                spec("unknown", ["no-such-program"]),
            )
            status = await manager.exited("code")
            assert (status.exit.reason, status.exit.code) == ("EXITED", 42)
            assert status.exit.log_tail == "to stdout\nthe last words\n"
            assert status.pid == 0
            status = await manager.exited("signal")
            assert (status.exit.reason, status.exit.code) == ("SIGNALED", 128 + 11)
            assert "SIGSEGV" in status.exit.message
            status = await manager.exited("missing")
            assert status.exit.reason == "START_FAILED"
            assert "`/no/such/program`: it does not exist" in status.exit.message
            assert "is not on PATH" in (await manager.exited("unknown")).exit.message

    asyncio.run(run())


def test_kill_of_the_main_process_is_seen_at_once_and_takes_its_children_along(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            manager.want(spec("k1", f"setsid sleep 1000.{os.getpid()} & exec python server.py"))
            status = await manager.healthy("k1")
            os.kill(status.pid, signal.SIGKILL)
            ended = await manager.exited("k1")
            assert (ended.exit.reason, ended.exit.code) == ("SIGNALED", 137)
            assert [line for line in processes_of(tmp_path) if "sleep" in line] == []
            assert not _named(f"1000.{os.getpid()}")

    asyncio.run(run())


@root_only
def test_out_of_memory_is_told(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            eat = "x = []\nwhile True: x.append(bytearray(b'x' * 4000000))"
            manager.want(spec("k1", ["python", "-c", eat], slots={"mem": 64 * 2**20 * 1000}))
            status = await manager.exited("k1")
            assert (status.exit.reason, status.exit.code) == ("OOM", 137)

    asyncio.run(run())


def test_a_flood_of_logs_neither_blocks_nor_fills_the_disk(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            flood = "head -c 60000000 /dev/zero | tr '\\0' 'x' | fold -w 99; echo; echo done; exit 3"
            manager.want(spec("k1", flood))
            status = await manager.exited("k1")
            assert status.exit.code == 3
            assert status.exit.log_tail.endswith("done\n")
            assert 1000 < len(status.exit.log_tail.encode()) <= 4096
            size = sum(path.stat().st_size for path in agent.kernel_folder("k1").glob("log*"))
            assert size <= 17 * 1024 * 1024

    asyncio.run(run())


def test_escapees_are_killed_at_removal(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            mark = f"2000.{os.getpid()}"
            # In a session of its own, orphaned, deaf to SIGTERM, and without a mark in its environment.
            escape = f"(trap '' TERM; setsid env -i /bin/sleep {mark} &) ; exec python server.py"
            manager.want(spec("k1", escape))
            await manager.healthy("k1")
            assert len(_named(mark)) == 1
            manager.unwant("k1")
            await manager.gone("k1")
            assert not _named(mark)

    asyncio.run(run())


def test_stop_is_graceful_and_then_is_not(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            polite = f"trap 'echo bye >{tmp_path}/polite; exit 0' TERM; python server.py & wait"
            deaf = (
                "trap '' TERM; python -c 'import signal; signal.signal(15, signal.SIG_IGN); "
                'exec(open("server.py").read())\''
            )
            manager.want(spec("polite", polite, stop_grace_ms=90_000), spec("deaf", deaf, stop_grace_ms=700))
            await manager.healthy("polite")
            deaf_pid = (await manager.healthy("deaf")).pid
            manager.unwant("polite")
            # Long before its grace is over.
            await manager.gone("polite")
            assert (tmp_path / "polite").read_text() == "bye\n"
            began = time.monotonic()
            manager.unwant("deaf")
            await manager.gone("deaf")
            assert time.monotonic() - began >= 0.7
            assert not alive(deaf_pid)

    asyncio.run(run())


def test_pre_start_actions(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            actions = [
                action("", mkdir=fleet_pb2.Mkdir(path="/home/work/a/b", parents=True)),
                action(
                    "conf",
                    write_file=fleet_pb2.WriteFile(
                        filename="/home/work/a/conf",
                        body="port={port} model={model_path} {left}\n",
                        mode=0o600,
                    ),
                ),
                action("", write_file=fleet_pb2.WriteFile(filename="{conf}", body="more\n", append=True)),
                action(
                    "tmp",
                    write_tempfile=fleet_pb2.WriteTempfile(body="print('six', 7)", mode=0o644, suffix=".py"),
                ),
                action("out", run_command=fleet_pb2.RunCommand(command=["python", "{tmp}"], check=True)),
                action("", run_command=fleet_pb2.RunCommand(command=["false"], check=False)),
                action("", log=fleet_pb2.Log(message="said {out} {out.out}{out.err}")),
            ]
            manager.want(spec("k1", 'cat {conf}; echo "${HOME}" \'{"a": {out}}\'', pre_start_actions=actions))
            status = await manager.exited("k1")
            assert status.exit.code == 0, status
            lines = status.exit.log_tail.splitlines()
            assert lines[0] == "said six 7 six 7"
            assert re.match(r"port=\d+ ", lines[1]) and lines[1].endswith("{left}")
            assert lines[2] == "more"
            assert lines[3].endswith('{"a": six 7}')

    asyncio.run(run())


def test_a_failing_action_stops_the_start(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            fine = action("", log=fleet_pb2.Log(message="one"))
            broken = action(
                "",
                run_command=fleet_pb2.RunCommand(command=["bash", "-c", "echo why >&2; exit 9"], check=True),
            )
            read_only = action("", write_file=fleet_pb2.WriteFile(filename="x", body="y"))
            manager.want(
                spec("k1", f"touch {tmp_path}/started", pre_start_actions=[fine, broken]),
                spec("k2", f"touch {tmp_path}/started", pre_start_actions=[read_only]),
            )
            status = await manager.exited("k1")
            assert status.exit.reason == "ACTION_FAILED"
            assert "pre-start action 1 (run_command) failed" in status.exit.message
            assert "exited with code 9: why" in status.exit.message
            # The message says it; the log's end does not say it again.
            assert status.exit.log_tail == "one\n"
            status = await manager.exited("k2")
            assert "read-only" in status.exit.message and "/home/work" in status.exit.message
            assert not (tmp_path / "started").exists()
            assert not (manager.storage / "folder-1" / "x").exists()

    asyncio.run(run())


def test_a_stranger_on_the_port_is_not_the_session(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            manager.want(spec("k1", ["sleep", "1000"]), spec("k2", ["sleep", "1000"], health_check=None))
            for uid in ("k1", "k2"):
                port = (await manager.status(uid, lambda s: s.port != 0)).port
                stranger = await asyncio.start_server(_answer_ok, "127.0.0.1", port)
                status = await manager.status(uid, lambda s: "another process" in s.probe_detail)
                assert status.health != fleet_pb2.KERNEL_HEALTH_HEALTHY
                stranger.close()
                await stranger.wait_closed()

    asyncio.run(run())


def test_a_program_that_listens_on_a_port_of_its_own_is_told_so(tmp_path: Path) -> None:
    async def run() -> None:
        code = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); time.sleep(1000)"
        async with cluster(tmp_path) as (manager, _):
            manager.want(spec("k1", ["python", "-c", code]))
            status = await manager.status("k1", lambda s: "the session listens on" in s.probe_detail)
            assert status.probe_detail.startswith(f"nothing listens on port {status.port} (the session")
            assert "let its command listen on {port}" in status.probe_detail

    asyncio.run(run())


def test_fixed_ports(tmp_path: Path) -> None:
    async def run() -> None:
        port = free_port()
        async with cluster(tmp_path) as (manager, _):
            manager.want(spec("k1", port=port, fixed_port=True))
            assert (await manager.healthy("k1")).port == port
            manager.want(spec("k2", port=port, fixed_port=True))
            status = await manager.exited("k2")
            assert status.exit.reason == "PORT_FAILED" and str(port) in status.exit.message
            manager.unwant("k1")
            await manager.gone("k1")
            manager.want(spec("k3", port=port, fixed_port=True))
            assert (await manager.healthy("k3")).port == port

    asyncio.run(run())


def test_sigint_stops_the_sessions_and_sigterm_does_not(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            manager.want(spec("k1"))
            status = await manager.healthy("k1")
            assert await agent.end(signal.SIGTERM) == 0
            assert alive(status.pid)
            await agent.start()
            await manager.until(lambda: manager.complete_reports == 2)
            assert manager.statuses["k1"].pid == status.pid
            assert await agent.end(signal.SIGINT) == 0
            assert not alive(status.pid)
            await agent.start()
            await manager.until(lambda: manager.complete_reports == 3)
            ended = manager.statuses["k1"]
            assert ended.phase == fleet_pb2.KERNEL_PHASE_EXITED
            assert (ended.exit.reason, ended.exit.code) == ("SIGNALED", 143)

    asyncio.run(run())


def test_kill_of_the_shim_ends_the_session(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            manager.want(spec("k1"))
            status = await manager.healthy("k1")
            shim = int(Path(f"/proc/{status.pid}/stat").read_text().rpartition(")")[2].split()[1])
            os.kill(shim, signal.SIGKILL)
            ended = await manager.exited("k1")
            assert (ended.exit.reason, ended.exit.code) == ("LOST", -1)
            assert not alive(status.pid)

    asyncio.run(run())


def test_grants_are_checked(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path, "--simulated-gpus", "1") as (manager, _):

            def grant(device: str, amount: int) -> list[fleet_pb2.DeviceGrant]:
                return [fleet_pb2.DeviceGrant(device=device, slot="cuda.shares", amount=amount)]

            manager.want(spec("k1", devices=grant("SIM-node-1-0", 700)))
            await manager.healthy("k1")
            manager.want(
                spec("k2", devices=grant("SIM-node-1-0", 400)), spec("k3", devices=grant("GPU-unknown", 100))
            )
            assert "0.4 more do not fit" in (await manager.exited("k2")).exit.message
            status = await manager.exited("k3")
            assert status.exit.reason == "START_FAILED" and "not on this node" in status.exit.message

    asyncio.run(run())


async def _answer_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1000)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    await writer.drain()
    writer.close()


def _named(text: str) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if text.encode() in arguments and b"sleep" in arguments[0]:
            found.append(int(folder.name))
    return found
