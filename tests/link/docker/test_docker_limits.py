"""Limits and profiles of containers, as those see them who run in one."""

from __future__ import annotations

import asyncio
from pathlib import Path

from containers import engines
from containers.nodes import container, kernel, node, report

from dure.fleet.v1 import fleet_pb2

LOOK = """
import json, os, pathlib, resource
def read(*paths):
    for path in paths:
        try:
            return pathlib.Path(path).read_text().strip()
        except OSError:
            pass
status = dict(line.split(":", 1) for line in read("/proc/self/status").splitlines())
def tries(path):
    try:
        pathlib.Path(path).write_text("x")
        return ""
    except OSError as error:
        return error.strerror
shm = os.statvfs("/dev/shm")
one = "/sys/fs/cgroup/"
found = {
    "quota": read(one + "cpu/cpu.cfs_quota_us", one + "cpu.max"),
    "memory": read(one + "memory/memory.limit_in_bytes", one + "memory.max"),
    "swap": read(one + "memory/memory.memsw.limit_in_bytes", one + "memory.swap.max"),
    "pids": read(one + "pids/pids.max", one + "pids.max"),
    "shm": shm.f_blocks * shm.f_frsize,
    "nofile": resource.getrlimit(resource.RLIMIT_NOFILE),
    "memlock": resource.getrlimit(resource.RLIMIT_MEMLOCK),
    "uid": os.getuid(),
    "writes": {p: tries(p) for p in
        ("/home/work/x", "/tmp/x", "/root-file", "/usr/x", "/dev/shm/x", "/models/x")},
    **{name: status[name].strip() for name in ("NoNewPrivs", "Seccomp", "CapEff", "CapBnd", "CapPrm")},
}
pathlib.Path("/home/work/report.tmp").write_text(json.dumps(found))
os.rename("/home/work/report.tmp", "/home/work/report.json")
import time; time.sleep(3600)
"""
# Bits of capabilities.
CHOWN, NET_RAW, SYS_ADMIN, MKNOD, AUDIT_WRITE, SETFCAP = 0, 13, 21, 27, 29, 31


def has(mask: str, bit: int) -> bool:
    return bool(int(mask, 16) >> bit & 1)


def test_limits_and_profiles_from_inside(tmp_path: Path) -> None:
    async def run(toor: str, user: str) -> None:
        async with node(tmp_path) as (manager, agent):
            (manager.storage / "folder-1" / "look.py").write_text(LOOK)

            def look(
                uid: str, image: str, profile: fleet_pb2.SecurityProfile.ValueType
            ) -> fleet_pb2.KernelSpec:
                return kernel(
                    uid,
                    ["python", "look.py"],
                    health_check=None,
                    image=image,
                    security_profile=profile,
                    shared_memory_bytes=32 * 2**20,
                    slots={"cpu": 1500, "mem": 256 * 2**20 * 1000},
                )

            default, strict = fleet_pb2.SECURITY_PROFILE_DEFAULT, fleet_pb2.SECURITY_PROFILE_STRICT
            manager.want(
                look("k1", engines.IMAGE, default),
                look("k2", engines.IMAGE, strict),
                look("k3", user, strict),
                look("k4", toor, strict),
            )
            found = await report(manager, agent, "k1")
            assert found["quota"] in ("150000", "150000 100000")
            assert found["memory"] == str(256 * 2**20)
            # v1 counts memory and swap together, v2 swap alone.
            assert found["swap"] in (str(256 * 2**20), "0")
            assert (found["pids"], found["shm"]) == ("4096", 32 * 2**20)
            assert found["nofile"][0] == found["nofile"][1] >= 1024
            assert found["memlock"][0] == found["memlock"][1]
            assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
            assert found["uid"] == 0 and has(found["CapEff"], CHOWN)
            for bit in (NET_RAW, SYS_ADMIN, MKNOD, AUDIT_WRITE, SETFCAP):
                assert not has(found["CapBnd"], bit), bit
            assert found["writes"]["/root-file"] == found["writes"]["/home/work/x"] == ""

            for uid, number in (("k2", 1000), ("k3", 1234)):
                found = await report(manager, agent, uid)
                assert found["uid"] == number
                assert {found[name] for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
                assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
                assert found["writes"]["/root-file"] == found["writes"]["/usr/x"] == "Read-only file system"
                assert found["writes"]["/models/x"] == "Read-only file system"
                for path in ("/home/work/x", "/tmp/x", "/dev/shm/x"):
                    assert found["writes"][path] == "", path
                assert found["memory"] == str(256 * 2**20)

            settings = (await container(agent, "k1"))["HostConfig"]
            assert settings["LogConfig"] == {
                "Type": "json-file",
                "Config": {"max-size": "8m", "max-file": "2"},
            }
            assert settings["Memory"] == settings["MemorySwap"] and settings["Init"] is True
            assert settings["RestartPolicy"]["Name"] == "no" and not settings["Privileged"]

            # A user of another name with the superuser's number is the superuser.
            ended = await manager.exited("k4")
            assert ended.exit.reason == "START_FAILED", ended.exit
            assert "superuser" in ended.exit.message

    with (
        engines.variant("user", "USER 1234:1234") as user,
        engines.changed("toor", "echo 'toor:x:0:0::/:/bin/sh' >> /etc/passwd", "USER toor") as toor,
    ):
        asyncio.run(run(toor, user))
