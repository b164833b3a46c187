"""`dure dev` with the real programs: it comes up, tells of deaths, takes over, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import metrics_page
import own_ports
import tomli
from link.client.dure_program import Dure, Ran, finish
from link.client.fake_manager import until

UP_S = 30.0


def _left(data_dir: Path) -> list[str]:
    """Command lines of all processes that name the data folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes()
        except OSError:
            continue
        if str(data_dir).encode() in line:
            found.append(line.replace(b"\0", b" ").decode())
    return found


async def _up(dure: Dure, data_dir: Path) -> asyncio.subprocess.Process:
    # Ports are recorded at the first start. The usual ones may be another run's in the next moment.
    given: list[str] = []
    if not (data_dir / "dev.toml").exists():
        manager, admin, *pool = sorted(own_ports.free_ports(6))
        given += ["--manager-port", str(manager), "--proxy-admin-port", str(admin)]
        given += ["--proxy-ports", f"{pool[0]}-{pool[-1]}"]
    process = await dure.start("dev", "--data-dir", str(data_dir), *given)
    well = await dure("doctor", "--wait", f"{UP_S:g}")
    assert well.code == 0, (well, (await _stop(process)) if process.returncode is None else "dev ended")
    return process


async def _stop(process: asyncio.subprocess.Process, number: signal.Signals = signal.SIGINT) -> Ran:
    process.send_signal(number)
    return await finish(process)


def test_it_comes_up_tells_of_deaths_and_leaves_nothing(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    dure = Dure(data_dir / "context.toml", tmp_path)

    async def run() -> None:
        process = await _up(dure, data_dir)
        second = await dure("dev", "--data-dir", str(data_dir))
        assert second.code != 0 and "another process already runs dev" in second.err
        recorded = tomli.loads((data_dir / "dev.toml").read_text())
        for port, family in zip(
            recorded["metrics_ports"], ("dure_manager_info", "dure_agent_info"), strict=True
        ):
            assert family in await metrics_page.read(port)
        assert process.stderr is not None
        os.kill(int((data_dir / "run" / "proxy-1.pid").read_text()), signal.SIGKILL)
        while b"proxy-1 was ended by SIGKILL" not in (line := await process.stderr.readline()):
            assert line
        assert f"dure proxy --data-dir {data_dir} --name proxy-1" in line.decode()
        by_hand = await dure.start("proxy", "--data-dir", str(data_dir))
        while b"proxy-1 is back" not in (line := await process.stderr.readline()):
            assert line
        stopped = await _stop(process)
        assert stopped.code == 0 and "nothing is left running" in stopped.err
        assert (await finish(by_hand)).code == 0
        assert "2 GPUs, SIMULATED" in stopped.out
        await until(lambda: not _left(data_dir))
        assert not [*(data_dir / "run").glob("*.pid")]

    async def bounded() -> None:
        async with asyncio.timeout(90):
            await run()

    asyncio.run(bounded())


def test_a_back_end_that_is_not_there_or_not_reached_is_told(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    dure = Dure(data_dir / "context.toml", tmp_path)
    dure.environ["DOCKER_HOST"] = f"unix://{tmp_path}/no.sock"

    async def run() -> None:
        nonsense = await dure("dev", "--data-dir", str(data_dir), "--backend", "nonsense")
        assert nonsense.code == 2 and "there are: docker, process" in nonsense.err
        assert not data_dir.exists()
        process = await dure.start("dev", "--data-dir", str(data_dir), "--backend", "docker")
        assert process.stderr is not None
        while b"waiting for agents and proxy to connect" not in (line := await process.stderr.readline()):
            assert line
        assert b"agent-1: warning: waiting for the container engine" in await process.stderr.readline()
        await _stop(process)
        await until(lambda: not _left(data_dir))

    async def bounded() -> None:
        async with asyncio.timeout(90):
            await run()

    asyncio.run(bounded())


def test_programs_that_outlived_dev_are_taken_over(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    dure = Dure(data_dir / "context.toml", tmp_path)

    async def run() -> None:
        process = await _up(dure, data_dir)
        manager = (data_dir / "run" / "manager.pid").read_text()
        await _stop(process, signal.SIGKILL)
        assert (await dure("doctor")).code == 0
        again = await _up(dure, data_dir)
        assert (data_dir / "run" / "manager.pid").read_text() == manager
        # The cluster is well without it: only its own words tell that it has come up.
        assert again.stderr is not None
        while b"manager runs already" not in (line := await again.stderr.readline()):
            assert line
        assert (await _stop(again, signal.SIGTERM)).code == 0
        await until(lambda: not _left(data_dir))

    async def bounded() -> None:
        async with asyncio.timeout(90):
            await run()

    asyncio.run(bounded())


def test_a_given_port_that_is_taken_is_an_error(tmp_path: Path) -> None:
    dure = Dure(tmp_path / "context.toml", tmp_path)

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as holder:
            port = holder.getsockname()[1]
            ran = await dure("dev", "--data-dir", str(tmp_path / "d"), "--manager-port", str(port))
        assert ran.code == 1 and f"port {port} (--manager-port) is taken" in ran.err
        assert not _left(tmp_path / "d")

    asyncio.run(run())


def test_a_program_that_cannot_start_is_told_with_its_log(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    (data_dir / "manager").mkdir(parents=True)
    (data_dir / "manager" / "dure.db").write_text("this is no database, but it is long" * 200)
    dure = Dure(tmp_path / "context.toml", tmp_path)

    async def run() -> None:
        async with asyncio.timeout(60):
            ran = await dure("dev", "--data-dir", str(data_dir))
        assert ran.code == 1 and "error: manager exited with code" in ran.err
        assert "database" in ran.err
        assert not _left(data_dir)

    asyncio.run(run())
