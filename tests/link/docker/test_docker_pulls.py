"""Images from a registry: fetched once for all, seen while it lasts, broken off when nobody waits."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from containers import registry
from containers.nodes import kernel, names, node

from dure.fleet.v1 import fleet_pb2

ALWAYS = fleet_pb2.IMAGE_PULL_POLICY_ALWAYS
SERVE = ["/bin/busybox", "httpd", "-f", "-p", "{port}"]
MIB = 2**20


def pulled(uid: str, image: str, **fields: object) -> fleet_pb2.KernelSpec:
    return kernel(uid, SERVE, image=image, health_check=None, **fields)


def test_one_fetch_for_two_with_progress(tmp_path: Path) -> None:
    async def run() -> None:
        async with registry.serving() as images, node(tmp_path) as (manager, agent):
            images.bytes_per_s = MIB // 4
            image = images.add("team/slow", [registry.tool(), registry.noise(4 * MIB)])
            manager.want(pulled("k1", image), pulled("k2", image))

            def fetching(uid: str) -> bool:
                return any(
                    0 < layer.current_bytes < layer.total_bytes and layer.status == "Downloading"
                    for layer in manager.statuses[uid].pull.layers
                )

            for uid in ("k1", "k2"):
                await manager.until(lambda uid=uid: uid in manager.statuses and fetching(uid))
                seen = manager.statuses[uid]
                assert seen.message == f"fetching image {image}" and seen.pull.image == image
                assert len(seen.pull.layers) == 2
            images.bytes_per_s = 0
            for uid in ("k1", "k2"):
                await manager.healthy(uid)
                assert not manager.statuses[uid].HasField("pull")
            assert images.pulls == ["team/slow"]
            # It is there now. `always` asks again, though nothing has to be brought.
            manager.want(pulled("k3", image))
            await manager.healthy("k3")
            assert len(images.pulls) == 1
            before = images.begun
            manager.want(pulled("k4", image, image_pull_policy=ALWAYS))
            await manager.healthy("k4")
            assert images.begun == before
            for uid in ("k1", "k2", "k3", "k4"):
                manager.unwant(uid)
            for uid in ("k1", "k2", "k3", "k4"):
                await manager.gone(uid)
            assert await names(agent) == []

    asyncio.run(run())


def test_a_fetch_ends_with_the_last_who_waits(tmp_path: Path) -> None:
    async def run() -> None:
        async with registry.serving() as images, node(tmp_path) as (manager, agent):
            images.bytes_per_s = MIB // 2
            image = images.add("huge", [registry.tool(), registry.noise(16 * MIB)])
            manager.want(pulled("k1", image), pulled("k2", image))
            await manager.until(lambda: images.begun > 1 and len(manager.statuses["k2"].pull.layers) == 2)
            manager.unwant("k1")
            await manager.gone("k1")
            await asyncio.sleep(0.5)
            assert images.cut == 0, "another waits"
            manager.unwant("k2")
            await manager.gone("k2")
            await manager.until(lambda: images.cut > 0)
            # Whoever wants it then begins anew; so does an agent that was killed in the middle.
            begun, cut, reports = images.begun, images.cut, manager.complete_reports
            manager.want(pulled("k3", image))
            await manager.until(lambda: images.begun > begun)
            await agent.end(signal.SIGKILL)
            await manager.until(lambda: images.cut > cut)
            images.bytes_per_s = 0
            await agent.start()
            await manager.until(lambda: manager.complete_reports > reports)
            await manager.healthy("k3")
            assert await names(agent) == ["k3"]

    asyncio.run(run())


def test_a_private_registry(tmp_path: Path) -> None:
    async def run() -> None:
        async with registry.serving() as images, node(tmp_path) as (manager, agent):
            image = images.add("private", [registry.tool()])
            images.user = ("ann", "se:cret")
            for uid, credential in (("none", ("", "")), ("wrong", ("ann", "other"))):
                manager.image_credential = credential
                manager.want(pulled(uid, image))
                ended = (await manager.exited(uid)).exit
                assert ended.reason == "IMAGE_FAILED", ended
                assert "dure registry set" in ended.message, ended
                assert "other" not in ended.message
            manager.image_credential = ("ann", "se:cret")
            manager.want(pulled("right", image))
            await manager.healthy("right")
            assert manager.credential_asked == ["none", "wrong", "right"]
            assert "se:cret" not in agent.log.read_text()

            missing = f"{images.at}/private:2"
            manager.want(pulled("missing", missing))
            ended = (await manager.exited("missing")).exit
            assert ended.reason == "IMAGE_FAILED" and "is there such a tag" in ended.message, ended

    asyncio.run(run())
