"""Every way in which a session cannot start or ends says what it was, once, and what came last."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from agent_fakes import cluster, spec
from test_agent_node import root_only

from dure.fleet.v1 import fleet_pb2


def test_commands_that_cannot_be_run(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            folder = manager.storage / "folder-1"
            (folder / "plain.py").write_text("print('never')")
            (folder / "lost.sh").write_text("#!/no/such/interpreter\n")
            (folder / "lost.sh").chmod(0o755)
            (folder / "noise").write_bytes(b"\x00\x01\x02")
            (folder / "noise").chmod(0o755)
            manager.want(
                spec("plain", ["/models/plain.py"]),
                spec("folder", ["/models"]),
                spec("lost", ["/models/lost.sh"]),
                spec("noise", ["/models/noise"]),
                spec("shell-127", "echo before; no-such-command"),
                spec("shell-126", "echo before; /models/plain.py"),
                spec("no-shell", "true"),
            )
            for uid, reason, code, message in (
                ("plain", "START_FAILED", 127, "`/models/plain.py`: it is not executable (`chmod +x`"),
                ("folder", "START_FAILED", 127, "`/models`: it is a folder"),
                ("lost", "START_FAILED", 127, "its first line) does not exist"),
                ("noise", "START_FAILED", 127, "is it a program for this machine?"),
                ("shell-127", "EXITED", 127, "code 127 (to a shell: command not found)"),
                ("shell-126", "EXITED", 126, "code 126 (to a shell: not executable)"),
            ):
                ended = (await manager.exited(uid)).exit
                assert (ended.reason, ended.code) == (reason, code) and message in ended.message, ended
                # The log has the sentence; who shows both shows it once.
                assert ended.message not in ended.log_tail
                if reason == "START_FAILED":
                    assert ended.log_tail == "" and await manager.log_of(uid) == [ended.message]
                else:
                    assert ended.log_tail.startswith("before\n")

    asyncio.run(run())


def test_actions_that_fail_say_which_and_what_they_said(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            echoed = fleet_pb2.RunCommand(
                command=["sh", "-c", "echo loaded; echo bad >&2; exit 4"], echo=True
            )
            echoed.check = True
            signaled = fleet_pb2.RunCommand(command=["sh", "-c", "kill -9 $$"], check=True)
            missing = fleet_pb2.RunCommand(command=["no-such-tool"], check=True)
            for index, (uid, action, message) in enumerate(
                (
                    ("echo", {"run_command": echoed}, "`sh` exited with code 4: bad"),
                    ("kill", {"run_command": signaled}, "`sh` was ended by SIGKILL"),
                    ("none", {"run_command": missing}, "`no-such-tool`: No such file or directory"),
                    ("mkdir", {"mkdir": fleet_pb2.Mkdir(path="/home/work/a/b")}, "No such file or directory"),
                )
            ):
                before = [
                    fleet_pb2.PreStartAction(log=fleet_pb2.Log(message=f"step {n}")) for n in range(index)
                ]
                manager.want(spec(uid, pre_start_actions=[*before, fleet_pb2.PreStartAction(**action)]))
                ended = (await manager.exited(uid)).exit
                (kind,) = action
                assert ended.reason == "ACTION_FAILED"
                assert ended.message.startswith(f"pre-start action {index} ({kind}) failed: ")
                assert message in ended.message, ended
                assert ended.log_tail.count("step") == index and "failed" not in ended.log_tail
            assert (await manager.log_of("echo"))[:2] == ["loaded", "bad"]

    asyncio.run(run())


def test_folders_that_cannot_be_had(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            for uid, message in (
                ("folder-9", "is not in the shared storage"),
                ("../x", "is no uid of a folder"),
            ):
                model = fleet_pb2.Mount(folder_uid=uid, folder="gone", target="/models")
                kernel = f"k{len(uid)}"
                manager.want(spec(kernel, model=model))
                ended = (await manager.exited(kernel)).exit
                assert ended.reason == "FOLDER_FAILED" and message in ended.message

    asyncio.run(run())


@root_only
def test_out_of_memory_keeps_the_last_words(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            assert manager.hello is not None
            if any("no limits" in limitation for limitation in manager.hello.limitations):
                pytest.skip("no control groups here")
            eat = "echo loading; exec python -c 'x = []\nwhile True: x.append(bytearray(b\"x\" * 4000000))'"
            manager.want(spec("k1", eat, slots={"mem": 64 * 2**20 * 1000}))
            ended = (await manager.exited("k1")).exit
            assert (ended.reason, ended.code, ended.log_tail) == ("OOM", 137, "loading\n")
            assert "more memory than it was granted" in ended.message

    asyncio.run(run())
