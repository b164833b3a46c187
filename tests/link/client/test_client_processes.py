"""Processes of a development cluster: found again, signalled, told how they ended."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from dure.client.dev.processes import find, last_lines, spawn

HOLDER = """
import sys
from pathlib import Path
from dure.wire import programs
with programs.running(Path(sys.argv[1]), "manager", Path(sys.argv[1]) / "manager"):
    print("up", flush=True)
    sys.stdin.read()
"""


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await body()

    asyncio.run(bounded())


def test_a_program_started_by_hand_is_found_by_its_lock(tmp_path: Path) -> None:
    pid_file, lock = tmp_path / "run" / "manager.pid", tmp_path / "manager" / "lock"

    async def body() -> None:
        assert find(pid_file, lock) is None
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", HOLDER, str(tmp_path)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert child.stdout is not None
        await child.stdout.readline()
        found = find(pid_file, lock)
        assert found is not None and found.pid == child.pid
        found.let_go()
        found = find(pid_file, lock)
        assert found is not None and found.alive and child.returncode is None
        found.send(signal.SIGKILL)
        await found.ended()
        await child.wait()
        assert not found.alive
        # The pid file is still there, and names nobody that holds the lock.
        assert pid_file.exists() and find(pid_file, lock) is None
        pid_file.write_text(f"{os.getpid()}\n")
        assert find(pid_file, lock) is None
        pid_file.write_text("nonsense")
        assert find(pid_file, lock) is None

    run(body)


def test_a_child_tells_how_it_ended(tmp_path: Path) -> None:
    async def body() -> None:
        good = spawn(["--version"], {}, tmp_path / "good.stderr")
        bad = spawn(["nonsense"], {}, tmp_path / "bad.stderr")
        await good.ended()
        await bad.ended()
        assert (good.succeeded, good.how) == (True, "exited with code 0")
        assert (bad.succeeded, bad.how) == (False, "exited with code 2")
        assert "No such command" in " ".join(last_lines(tmp_path / "bad.stderr"))
        killed = spawn(
            ["doctor", "--wait", "20"], {"DURE_CONTEXT_FILE": str(tmp_path / "none")}, tmp_path / "k"
        )
        assert os.getsid(killed.pid) == killed.pid
        killed.send(signal.SIGKILL)
        await killed.ended()
        assert killed.how == "was ended by SIGKILL"
        killed.send(signal.SIGTERM)

    run(body)


def test_the_last_lines_of_a_json_log_are_for_people(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text('{"level": "error", "message": "port taken"}\nplain\n')
    assert last_lines(tmp_path / "x.log", tmp_path / "none") == ["error: port taken", "plain"]
