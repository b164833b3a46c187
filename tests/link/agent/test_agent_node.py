"""What a node allows: mount destinations, limits, and the fallbacks where it allows less."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from pathlib import Path

import own_ports
import pytest
from agent_fakes import AgentProcess, alive, cluster, processes_of, spec

from dure.agent.backends.cgroups import Cgroups, Hierarchy
from dure.fleet.v1 import fleet_pb2

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs cgroups and mount namespaces")

# A node that lets its agent make neither control groups nor mount namespaces.
POOR = (
    *("unshare", "-m", "sh", "-c"),
    'mount -t tmpfs none /sys/fs/cgroup && exec setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin "$@"',
    "sh",
)
# Not root, but allowed to make a user namespace.
USER = ("unshare", "-U", "--map-user=1000", "--map-group=1000")


def usable(prefix: tuple[str, ...]) -> bool:
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return False
    return subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0


@root_only
def test_mount_destinations(tmp_path: Path) -> None:
    targets = {
        "top": "/models",
        "beside": "/opt/m",
        "deep": "/home/x/models",
        "home": "/home/work/models",
        "root": "/root/a/b",
        "link": "/var/run/m",
        "system": "/usr/share/m",
        "tmp": "/tmp/dure-test-m",
        "new": "/a/b/c/d",
    }

    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            for uid, target in targets.items():
                line = (
                    f"! touch {target}/x && touch /home/work/y && ls /usr/bin/env && "
                    "test -e $BACKEND_MODEL_PATH/server.py && exec python {model_path}/server.py"
                )
                mount = fleet_pb2.Mount(folder_uid="folder-1", folder="m", target=target)
                manager.want(spec(uid, line, model=mount, model_path=target))
            for uid, target in targets.items():
                status = await manager.status(uid, lambda s: s.phase == 4 or s.health == 2)
                log = (agent.kernel_folder(uid) / "log").read_text()
                assert status.health == fleet_pb2.KERNEL_HEALTH_HEALTHY, log
                assert "Read-only file system" in log
                assert not Path(target).exists()

    asyncio.run(run())


@root_only
def test_destinations_that_would_break_the_session_are_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            for n, target in enumerate(("/", "/usr", "/home", "/home/work", "/proc/x", "models")):
                mount = fleet_pb2.Mount(folder_uid="folder-1", folder="m", target=target)
                manager.want(spec(f"k{n}", model=mount))
                status = await manager.exited(f"k{n}")
                assert status.exit.reason == "START_FAILED" and "mount destination" in status.exit.message

    asyncio.run(run())


def test_a_model_path_that_is_not_there(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            manager.want(spec("k1", model_path="/models/none"))
            status = await manager.exited("k1")
            assert status.exit.reason == "START_FAILED"
            assert "model_path" in status.exit.message and "cannot be entered" in status.exit.message

    asyncio.run(run())


@root_only
def test_limits_are_set(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, _):
            assert manager.hello is not None
            if any("no limits" in limitation for limitation in manager.hello.limitations):
                pytest.skip("no control groups here")
            manager.want(spec("k1", slots={"cpu": 500, "mem": 128 * 2**20 * 1000}))
            pid = (await manager.healthy("k1")).pid
            groups = Path(f"/proc/{pid}/cgroup").read_text()
            assert groups.count(f"/dure/{manager.wire('k1')}") >= 1
            values = [
                file.read_text().strip()
                for file in Path("/sys/fs/cgroup").glob(f"**/dure/{manager.wire('k1')}/*")
                if file.name in ("memory.limit_in_bytes", "memory.max", "cpu.cfs_quota_us", "cpu.max")
            ]
            assert str(128 * 2**20) in values
            assert "50000" in values or "50000 100000" in values

    asyncio.run(run())


@root_only
@pytest.mark.skipif(not usable(POOR), reason="needs unshare and setpriv")
def test_a_node_without_groups_and_mounts(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path, prefix=POOR) as (manager, agent):
            assert manager.hello is not None
            assert not manager.hello.maps_mounts
            assert len(manager.hello.limitations) == 2, manager.hello.limitations
            # Orphaned, deaf, and nameless.
            escape = f"(trap '' TERM; setsid env -i /bin/sleep 3000.{os.getpid()} &) ; exec python server.py"
            manager.want(
                spec("k1", escape), spec("k2", "pwd; echo {model_path} $BACKEND_MODEL_PATH $HOME; exit 5")
            )
            status = await manager.healthy("k1")
            ended = await manager.exited("k2")
            folder = str(manager.storage / "folder-1")
            home = str(agent.kernel_folder("k2") / "home")
            assert ended.exit.log_tail == f"{folder}\n{folder} {folder} {home}\n"
            await agent.end(signal.SIGKILL)
            await agent.start()
            await manager.until(lambda: manager.complete_reports == 2)
            assert manager.statuses["k1"].pid == status.pid
            manager.unwant("k1")
            await manager.gone("k1")
            assert not alive(status.pid)
            assert not [line for line in _commands() if f"sleep 3000.{os.getpid()}" in line]
            write = fleet_pb2.PreStartAction(write_file=fleet_pb2.WriteFile(filename="x", body="y"))
            manager.want(spec("k3", pre_start_actions=[write]))
            assert "read-only" in (await manager.exited("k3")).exit.message

    asyncio.run(run())


@pytest.mark.skipif(not usable(USER), reason="needs user namespaces")
def test_a_user_with_user_namespaces_sees_its_mounts(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path, prefix=USER) as (manager, agent):
            assert manager.hello is not None and manager.hello.maps_mounts, manager.hello
            manager.want(spec("k1", "pwd; ls; touch x; exec python /models/server.py"))
            await manager.healthy("k1")
            log = (agent.kernel_folder("k1") / "log").read_text()
            assert [line.partition(" ")[2] for line in log.splitlines()[:2]] == ["/models", "server.py"]
            assert "Read-only file system" in log

    asyncio.run(run())


def test_agents_of_one_host_share_leases_and_a_dead_one_keeps_its_own(tmp_path: Path) -> None:
    async def run() -> None:
        three = ("--session-ports", own_ports.option(own_ports.sessions()[:3]))
        async with cluster(tmp_path, *three) as (manager, agent):
            manager.want(spec("k1"))
            first = (await manager.healthy("k1")).port
            await agent.end(signal.SIGKILL)
            other = AgentProcess(tmp_path / "data", manager, *three, name="node-2")
            manager.specs.clear()
            await other.start()
            try:
                await manager.until(lambda: manager.complete_reports == 2)
                manager.want(spec("k2"), spec("k3"))
                ports = {first, (await manager.healthy("k2")).port, (await manager.healthy("k3")).port}
                assert len(ports) == 3
                manager.want(spec("k4"))
                assert (await manager.exited("k4")).exit.reason == "PORT_FAILED"
            finally:
                assert await other.end(signal.SIGINT) == 0

    asyncio.run(run())


def test_a_rebooted_node_says_so(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            manager.want(spec("k1"))
            await manager.healthy("k1")
            await agent.end(signal.SIGKILL)
            handle = agent.kernel_folder("k1") / "handle.json"
            text = handle.read_text()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            handle.write_text(text.replace(boot, "another-boot"))
            await agent.start()
            status = await manager.exited("k1")
            assert (status.exit.reason, status.exit.code) == ("NODE_REBOOTED", -1)
            # Nothing was rebooted: what still runs has to go, too.
            (agent.kernel_folder("k1") / "exit.json").unlink()
            handle.write_text(text)

    asyncio.run(run())


def test_hosts_without_groups_are_no_error(tmp_path: Path) -> None:
    mounts, own = tmp_path / "mountinfo", tmp_path / "cgroup"
    mounts.write_text("1 2 0:1 / / rw - ext4 /dev/x rw\n")
    own.write_text("0::/\n")
    groups = Cgroups.probe(str(mounts), str(own))
    assert groups.limitations == ("no limits on cpu, memory, pids of sessions: no usable control group",)
    created = groups.create("k", 1000, 1)
    assert created.folders == () and created.kill_file is None
    assert groups.no_pinning == "there is no control group with the controller `cpuset`"


def test_a_pinned_session_has_its_cores_beside_its_limits(tmp_path: Path) -> None:
    """In v2 one group has all; in v1 that of cpusets is made for those that are pinned, and inherits."""
    two, one = tmp_path / "two", tmp_path / "one"
    for folder in (two, one):
        folder.mkdir()
    all_in_one = Cgroups((Hierarchy(two, 2, frozenset({"cpu", "memory", "pids", "cpuset"})),), ())
    (made,) = all_in_one.create("k1", 1500, 2**30, "0-1", "0").folders
    assert [(made / f"cpuset.{name}").read_text() for name in ("cpus", "mems")] == ["0-1", "0"]
    assert (made / "cpu.max").read_text() == "150000 100000"
    (made,) = all_in_one.create("k2", 1500, 2**30).folders
    assert not (made / "cpuset.cpus").exists()

    for folder in (one, one / "dure", one / "dure" / "k1"):
        folder.mkdir(exist_ok=True)
        # As the kernel makes them: of a new group they are empty.
        for name in ("cpus", "mems"):
            (folder / f"cpuset.{name}").write_text("0-7\n" if folder == one else "\n")
    apart = Cgroups((), (), Hierarchy(one, 1, frozenset({"cpuset"})), "")
    assert apart.folders("k1") == [] and apart.create("k1", 1500, 2**30).folders == ()
    assert list(apart.create("k1", 1500, 2**30, "0-1").folders) == apart.folders("k1", pinned=True)
    values = [(one / "dure" / "k1" / f"cpuset.{name}").read_text() for name in ("cpus", "mems")]
    assert values == ["0-1", "0-7\n"]


def _commands() -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def test_many_sessions(tmp_path: Path) -> None:
    async def run() -> None:
        async with cluster(tmp_path) as (manager, agent):
            command = ["sleep", "1000"]
            manager.want(*(spec(f"k{n}", command, slots={}) for n in range(30)))
            await manager.until(
                lambda: (
                    sum(s.phase == fleet_pb2.KERNEL_PHASE_RUNNING for s in manager.statuses.values()) == 30
                )
            )
            assert len({s.port for s in manager.statuses.values()}) == 30
            assert await agent.end(signal.SIGINT) == 0
            assert not [line for line in processes_of(tmp_path) if "shim" in line]

    asyncio.run(run())
