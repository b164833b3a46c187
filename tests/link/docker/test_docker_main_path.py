"""Kernels as containers of a real engine: the main path."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from agent_fakes import alive
from containers import engines
from containers.nodes import answers, ask, container, kernel, names, node, report

from dure.fleet.v1 import fleet_pb2

LITERAL = ["python", "/models/server.py", "9123"]
LOOK = """
import json, os, pathlib
def tries(path):
    try:
        pathlib.Path(path).write_text("x")
        return ""
    except OSError as error:
        return error.strerror
found = {
    "environ": dict(os.environ), "cwd": os.getcwd(), "model": os.listdir("/models"),
    "hostname": os.uname().nodename,
    "writes": {path: tries(path) for path in
        ("/models/x", "/home/work/x", "/data/x", "/sub/x", "/root-file")},
    "data": os.listdir("/data"), "sub": os.listdir("/sub"),
}
pathlib.Path("/home/work/report.tmp").write_text(json.dumps(found))
os.rename("/home/work/report.tmp", "/home/work/report.json")
import time; time.sleep(3600)
"""


def test_a_kernel_becomes_healthy_is_measured_and_goes(tmp_path: Path) -> None:
    async def run() -> None:
        async with node(tmp_path) as (manager, agent):
            assert manager.hello is not None
            assert (manager.hello.backend, manager.hello.runs_images) == ("docker", True)
            assert fleet_pb2.SECURITY_PROFILE_STRICT in manager.hello.security_profiles
            manager.measure_every(300)
            # Longer than anybody waits. Python does not end on SIGTERM as the first process of a container,
            # but here it is not the first.
            patient = {"stop_grace_ms": 90_000}
            literal = {"port": 9123, "fixed_port": True, **patient}
            # Two that name one port: each has a network of its own.
            manager.want(
                kernel("k1", **patient), kernel("k2", LITERAL, **literal), kernel("k3", LITERAL, **literal)
            )
            ports = set()
            for uid, argument in (("k1", "8000"), ("k2", "9123"), ("k3", "9123")):
                status = await manager.healthy(uid)
                assert status.phase == fleet_pb2.KERNEL_PHASE_RUNNING and status.host == "127.0.0.1"
                # Prober and proxies reach the published port; the command binds the declared one.
                assert status.port not in (0, 8000, 9123)
                assert await ask(status) == f"/models|/home/work|{argument}"
                ports.add(status.port)
            assert len(ports) == 3
            status = manager.statuses["k1"]
            assert alive(status.pid)
            inspected = await container(agent, "k1")
            assert inspected["State"]["Pid"] == status.pid
            labels = inspected["Config"]["Labels"]
            assert labels["dure.agent-uid"] == "agent-uid" and labels["dure.agent"] == "node-1"
            assert labels["dure.session"] == manager.wire("session-k1") and labels["dure.generation"] == "1"

            await manager.until(lambda: "net_rx" in manager.values("k1"))
            before = manager.values("k1")
            for _ in range(50):
                await ask(status)
            await manager.until(lambda: manager.values("k1").get("net_rx", 0) > before["net_rx"])
            values = manager.values("k1")
            assert 4 * 2**20 < values["mem"] < 200 * 2**20, values
            assert 0 <= values["cpu_util"] <= 110, values

            for uid in ("k1", "k2", "k3"):
                manager.unwant(uid)
            for uid in ("k1", "k2", "k3"):
                await manager.gone(uid)
                assert not agent.kernel_folder(uid).exists()
            assert not alive(status.pid) and await names(agent) == []
            assert not await answers(status)

    asyncio.run(run())


def test_what_a_session_sees(tmp_path: Path) -> None:
    async def run() -> None:
        async with node(tmp_path) as (manager, agent):
            for name in ("data", "deep"):
                (manager.storage / name / "a" / "b").mkdir(parents=True)
                (manager.storage / name / "a" / "b" / "file").write_text("x")
            mounts = [
                fleet_pb2.Mount(folder_uid="data", folder="d", target="/data", writable=True),
                fleet_pb2.Mount(folder_uid="deep", folder="e", target="/sub", subpath="a/b"),
            ]
            (manager.storage / "folder-1" / "look.py").write_text(LOOK)
            spec = kernel("k1", ["python", "look.py"], health_check=None, extra_mounts=mounts)
            spec.slots["cuda.shares"] = 0
            manager.want(spec)
            found = await report(manager, agent, "k1")
            environ = found["environ"]
            assert environ["PORT"] == "8000" and environ["GREETING"] == "hello"
            assert environ["HOME"] == "/home/work" and environ["BACKEND_MODEL_PATH"] == "/models"
            assert environ["BACKENDAI_KERNEL_IMAGE"] == engines.IMAGE
            assert environ["PATH"].startswith("/usr/local/bin"), "the image's own"
            assert environ["NVIDIA_VISIBLE_DEVICES"] == "void"
            assert "DURE_JOIN_TOKEN" not in environ and "DOCKER_HOST" not in environ
            assert found["cwd"] == "/models" and "server.py" in found["model"]
            assert found["hostname"] == "main1"
            assert sorted(found["data"]) == ["a", "x"] and found["sub"] == ["file"]
            writes = found["writes"]
            assert writes["/models/x"] == writes["/sub/x"] == "Read-only file system"
            assert writes["/home/work/x"] == writes["/data/x"] == writes["/root-file"] == ""
            assert (manager.storage / "data" / "x").read_text() == "x"

    asyncio.run(run())


def test_the_command_of_the_image(tmp_path: Path) -> None:
    """Its entry point, command, working directory and user; none at all is said."""
    script = (
        "import json,os;found=[os.getcwd(),os.getuid(),os.environ['HOME']];"
        "json.dump(found,open('/home/work/report.json','w'))"
    )
    serve = (
        f"{script};import http.server as h;h.HTTPServer(('',8000),h.SimpleHTTPRequestHandler).serve_forever()"
    )

    async def run(own: str, other: str) -> None:
        async with node(tmp_path) as (manager, agent):
            specs = {uid: kernel(uid, health_check=None) for uid in ("own", "other", "none")}
            for spec, image in zip(specs.values(), (own, other, engines.IMAGE), strict=True):
                spec.ClearField("command")
                spec.image = image
            manager.want(*specs.values())
            ended = await manager.exited("none")
            assert ended.exit.reason == "START_FAILED" and "has no command of its own" in ended.exit.message
            await manager.healthy("own")
            assert await report(manager, agent, "own") == ["/var/tmp", 1234, "/home/work"]
            await manager.healthy("other")
            assert await report(manager, agent, "other") == ["/", 33, "/home/work"]

    cmd = json.dumps(["python", "-c", serve])
    point, argument = json.dumps(["python", "-c"]), json.dumps([serve])
    with (
        engines.variant("own", "USER 1234:1234", "WORKDIR /var/tmp", f"CMD {cmd}") as own,
        engines.variant("other", "USER www-data", f"ENTRYPOINT {point}", f"CMD {argument}") as other,
    ):
        asyncio.run(run(own, other))
