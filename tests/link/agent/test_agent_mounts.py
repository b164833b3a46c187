"""Folders beside the model folder, and shared memory."""

from __future__ import annotations

import asyncio
import platform
from pathlib import Path

import pytest
from agent_fakes import FakeManager, cluster, spec
from test_agent_node import USER, root_only, usable

from dure.fleet.v1 import fleet_pb2

SLEEP = "exec sleep 1000"


def mount(folder: str, target: str, **fields) -> fleet_pb2.Mount:
    return fleet_pb2.Mount(folder_uid=folder, folder=folder, target=target, **fields)


def fill(manager: FakeManager) -> Path:
    data = manager.storage / "data-1"
    (data / "sub" / "deep").mkdir(parents=True)
    (data / "top.txt").write_text("top")
    (data / "sub" / "deep" / "low.txt").write_text("low")
    (manager.storage / "data-2" / "x").mkdir(parents=True)
    (manager.storage / "data-2" / "two.txt").write_text("two")
    return data


async def lines_of(
    manager: FakeManager, uid: str, line: str, *mounts: fleet_pb2.Mount, **fields
) -> list[str]:
    manager.want(spec(uid, f"{line}; exit 0", extra_mounts=mounts, **fields))
    status = await manager.exited(uid)
    assert status.exit.reason == "EXITED", status.exit
    return await manager.log_of(uid)


async def refusal(manager: FakeManager, uid: str, *mounts: fleet_pb2.Mount) -> fleet_pb2.KernelExit:
    manager.want(spec(uid, SLEEP, extra_mounts=mounts))
    return (await manager.exited(uid)).exit


@root_only
def test_read_only_unless_asked_and_nested(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            data = fill(manager)
            line = (
                "cat /home/work/data/top.txt /mnt/other/two.txt; touch /home/work/data/no /mnt/other/yes; "
                "ls /home/work/data/sub/deep /models/inner; touch /models/no /models/inner/no; ls /models"
            )
            found = await lines_of(
                manager,
                "k1",
                line,
                mount("data-1", "/home/work/data"),
                mount("data-2", "/mnt/other", writable=True),
                mount("data-2", "/home/work/data/sub/deep"),
                mount("data-1", "/models/inner", subpath="sub/deep"),
            )
            text = "\n".join(found)
            assert "toptwo" in text
            assert text.count("Read-only file system") == 3, text
            assert "two.txt" in text and "low.txt" in text and "server.py" in text
            assert (manager.storage / "data-2" / "yes").exists() and not (data / "no").exists()
            # The model folder on the storage is as it was.
            assert sorted(path.name for path in (manager.storage / "folder-1").iterdir()) == ["server.py"]
            assert (manager.storage / "folder-1" / "server.py").read_text()

    asyncio.run(run())


@root_only
def test_a_mount_in_a_read_only_folder_does_not_open_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            fill(manager)
            (manager.storage / "folder-1" / "below").mkdir()
            (manager.storage / "folder-1" / "below" / "file").write_text("kept")
            line = (
                "echo x >/models/below/file; echo x >/models/server.py; "
                "touch /models/below/new /models/new; cat /models/a/b/top.txt"
            )
            found = await lines_of(manager, "k1", line, mount("data-1", "/models/a/b"))
            assert "\n".join(found).count("Read-only file system") == 4 and found[-1] == "top", found
            assert (manager.storage / "folder-1" / "below" / "file").read_text() == "kept"
            assert not (manager.storage / "folder-1" / "a").exists()

    asyncio.run(run())


@root_only
def test_links_lead_nowhere(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            data = fill(manager)
            secret = tmp_path / "secret"
            secret.mkdir()
            (data / "out").symlink_to(secret)
            (data / "sub" / "up").symlink_to("../..")
            for number, subpath in enumerate(("out", "sub/up/data-2", "../data-2", "none", "top.txt")):
                ended = await refusal(manager, f"k{number}", mount("data-1", "/home/work/d", subpath=subpath))
                assert ended.reason == "FOLDER_FAILED" and subpath in ended.message, ended
            # A destination that lies behind a link of another folder.
            (data / "link").symlink_to("/etc")
            ended = await refusal(
                manager, "k9", mount("data-1", "/home/work/a"), mount("data-2", "/home/work/a/link")
            )
            assert "symbolic link in the folder at /home/work/a" in ended.message, ended

    asyncio.run(run())


@root_only
def test_destinations_that_cannot_be(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            fill(manager)
            for number, target in enumerate(("/usr", "/home/work", "relative", "/sys/x")):
                ended = await refusal(manager, f"k{number}", mount("data-1", target))
                assert ended.reason == "START_FAILED" and f"`{target}`" in ended.message
            ended = await refusal(manager, "k8", mount("data-1", "/a"), mount("data-2", "/a/"))
            assert "two folders have the mount destination `/a`" in ended.message
            ended = await refusal(manager, "k9", mount("not-there", "/a"))
            assert ended.reason == "FOLDER_FAILED" and "`not-there`" in ended.message

    asyncio.run(run())


@root_only
def test_copies_are_mounted_and_never_written_to(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path, storage_path="/not/here") as (manager, agent):
            fill(manager)
            found = await lines_of(
                manager,
                "k1",
                "cat /home/work/d/low.txt /models/server.py | head -1",
                mount("data-1", "/home/work/d", subpath="sub/deep"),
            )
            assert found[0].startswith("low")
            used = (agent.kernel_folder("k1") / "content").read_text().split()
            assert len(used) == 2 and all((agent.home / "cache" / digest).is_dir() for digest in used)
            ended = await refusal(manager, "k2", mount("data-1", "/home/work/d", writable=True))
            assert ended.reason == "FOLDER_FAILED" and "share the manager's storage" in ended.message

    asyncio.run(run())


@root_only
def test_shared_memory_has_the_size_asked_for(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            line = (
                "stat -f -c '%b %S' /dev/shm; head -c 9000000 /dev/zero >/dev/shm/x; ls -A /dev/shm; "
                "rm /dev/shm/x; python -c 'import multiprocessing as m; print(m.Lock() and \"locks\")'"
            )
            found = await lines_of(manager, "k1", line, shared_memory_bytes=8 * 2**20)
            blocks, block_bytes = map(int, found[0].split())
            assert blocks * block_bytes == 8 * 2**20
            assert "No space left" in "\n".join(found) and found[-2:] == ["x", "locks"]
            assert not Path("/dev/shm/x").exists()

    asyncio.run(run())


@pytest.mark.skipif(not usable(USER), reason="needs user namespaces")
def test_a_user_with_user_namespaces_has_them_too(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path, prefix=USER) as (manager, _):
            fill(manager)
            found = await lines_of(
                manager,
                "k1",
                "cat /home/work/d/top.txt; touch /home/work/d/no; df --output=size /dev/shm",
                mount("data-1", "/home/work/d"),
                shared_memory_bytes=2**20,
            )
            assert (
                found[0].startswith("top")
                and "Read-only file system" in found[0]
                and found[-1].strip() == "1024"
            )

    asyncio.run(run())


def test_what_the_agent_says_of_its_node(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            assert manager.hello is not None
            assert manager.hello.architecture == platform.machine() and not manager.hello.runs_images
            imageless = spec("k1")
            imageless.command.ClearField("start")
            manager.want(imageless)
            status = await manager.exited("k1")
            assert status.exit.reason == "START_FAILED"
            assert "runs no images" in status.exit.message

    asyncio.run(run())
