"""How far images are: shown to who looks, and of no concern to the store and the controller."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

from link.manager.inside import model_folder
from link.manager.reporting_agent import agent, serve, with_program
from link.manager.test_manager_program import Manager

from dure.client import Client
from dure.fleet.v1 import fleet_pb2
from dure.manager import schema
from dure.manager.intake import Intake
from dure.manager.pulls import Pulls
from dure.manager.store import Key, Store
from dure.v1 import endpoint_pb2

IMAGE = "registry.example.com/team/server:1"


def pull(done: int) -> fleet_pb2.ImagePull:
    layers = [
        fleet_pb2.ImageLayer(id="aa", status="Pull complete", current_bytes=100, total_bytes=100),
        fleet_pb2.ImageLayer(id="bb", status="Downloading", current_bytes=done, total_bytes=1000),
    ]
    return fleet_pb2.ImagePull(image=IMAGE, layers=layers)


def test_progress_is_told_and_not_stored(tmp_path: Path) -> None:
    async def run() -> None:
        store, pulls = Store(tmp_path / "dure.db"), Pulls()
        await store.open()
        told: list[list[Key]] = []
        async with store.write() as tx:
            kernel = schema.Kernel(uid="k", replica_uid="r", endpoint_uid="e", session_uid="s", agent_uid="a")
            kernel.role, kernel.index, kernel.generation, kernel.wanted = "main", 1, 1, True
            kernel.slots, kernel.devices, kernel.fixed_port = {}, [], 0
            kernel.phase, kernel.health, kernel.status = "PENDING", "UNKNOWN", b""
            tx.session.add(kernel)
        store.listen(lambda _revision, keys: told.append(keys))
        intake = Intake(store, pulls)
        running = asyncio.create_task(intake.run())

        async def report(agent: str = "a", message: str = "fetching", **fields: object) -> list[list[Key]]:
            """What listeners heard of it."""
            status = fleet_pb2.KernelStatus(
                uid="k", phase="KERNEL_PHASE_PREPARING", message=message, **fields
            )
            told.clear()
            assert intake.report(agent, [status])
            await asyncio.sleep(0.1)
            return list(told)

        async def row() -> schema.Kernel:
            async with store.read() as session:
                return await session.get_one(schema.Kernel, "k")

        def shown() -> int:
            replica = endpoint_pb2.Replica(kernels=[endpoint_pb2.Kernel(uid="k")])
            pulls.show([replica])
            has = replica.kernels[0].HasField("pull")
            return replica.kernels[0].pull.layers[1].current_bytes if has else -1

        try:
            changed, moved = [("endpoint", "e")], [("progress", "e")]
            assert await report(pull=pull(0)) == [changed, moved]
            kept, revision = (await row()).status, store.revision
            for done in (100, 200, 1000):
                assert await report(pull=pull(done)) == [moved]
                assert shown() == done
            assert await report(pull=pull(1000)) == []
            assert await report("somebody else", pull=pull(5)) == []
            assert ((await row()).status, store.revision, shown()) == (kept, revision, 1000)
            assert await store.changes_after(revision, "endpoint") == []
            assert not fleet_pb2.KernelStatus.FromString(kept).HasField("pull")
            # What else a report says is stored as ever, and the end of a pull is told.
            assert await report(message="starting") == [changed, moved]
            assert shown() == -1
            assert await report(message="starting") == []
        finally:
            running.cancel()
            await asyncio.wait([running])
            await store.close()

    asyncio.run(run())


def test_memory_is_bounded() -> None:
    pulls = Pulls()
    layers = [fleet_pb2.ImageLayer(id=str(number)) for number in range(300)]
    for number in range(20_010):
        status = fleet_pb2.KernelStatus(uid=f"k{number}", pull=fleet_pb2.ImagePull(image=IMAGE))
        assert pulls.take(status) and status.HasField("pull")
    assert pulls.take(fleet_pb2.KernelStatus(uid="last", pull=fleet_pb2.ImagePull(layers=layers)))
    kernels = [endpoint_pb2.Kernel(uid=uid) for uid in ("k0", "k10", "k20009", "last")]
    replica = endpoint_pb2.Replica(kernels=kernels)
    pulls.show([replica])
    assert [kernel.HasField("pull") for kernel in replica.kernels] == [False, False, True, True]
    assert len(replica.kernels[3].pull.layers) == 256
    ended = endpoint_pb2.Replica(kernels=kernels[2:], status=endpoint_pb2.REPLICA_STATUS_FAILED)
    pulls.show([ended])
    assert not ended.kernels[0].HasField("pull")


def test_it_is_seen_by_who_gets_watches_and_validates(tmp_path: Path) -> None:
    async def body(manager: Manager, client: Client) -> None:
        await model_folder(client, tmp_path / "folder")
        async with agent(manager, client, "a") as running:
            await serve(client, "e", IMAGE)
            spec = await running.kernel("e")
            seen: list[int] = []
            async with aclosing(client.endpoints.watch("e")) as batches:
                async for batch in batches:
                    for endpoint in batch.endpoints:
                        if endpoint.replicas and endpoint.replicas[0].kernels[0].HasField("pull"):
                            (kernel,) = endpoint.replicas[0].kernels
                            seen.append(kernel.pull.layers[1].current_bytes)
                    done = 300 * len(set(seen))
                    if done > 900:
                        break
                    await running.report(spec, phase="KERNEL_PHASE_PREPARING", pull=pull(done))
            assert sorted(set(seen)) == [0, 300, 600, 900]
            events = [event.reason async for event in client.endpoints.events("e")]
            (kernel,) = (await client.endpoints.get("e")).replicas[0].kernels
            assert (kernel.pull.image, len(kernel.pull.layers)) == (IMAGE, 2)
            (replica,) = [replica async for replica in client.endpoints.replicas("e")]
            assert replica.kernels[0].HasField("pull")
            await running.report(spec, phase="KERNEL_PHASE_PREPARING", pull=pull(1000))
            assert [event.reason async for event in client.endpoints.events("e")] == events
            await running.report(spec, phase="KERNEL_PHASE_RUNNING", health="KERNEL_HEALTH_HEALTHY")
            async with asyncio.timeout(10):
                while (await client.endpoints.get("e")).replicas[0].kernels[0].HasField("pull"):
                    await asyncio.sleep(0.05)
            await client.endpoints.delete("e")

            slots = {"cpu": "0.1", "mem": "64m"}
            pieces = client.endpoints.validate(
                "try", model="m", image=IMAGE, architecture="x86_64", resource_slots=slots, timeout_s=20
            )
            told: list[int] = []

            async def fetch() -> None:
                spec = await running.kernel("try")
                for done in (0, 500):
                    await running.report(spec, phase="KERNEL_PHASE_PREPARING", pull=pull(done))
                    async with asyncio.timeout(10):
                        while done not in told:
                            await asyncio.sleep(0.02)
                await running.report(spec, phase="KERNEL_PHASE_PREPARING")
                async with asyncio.timeout(10):
                    while -1 not in told:
                        await asyncio.sleep(0.02)
                await running.report(
                    spec, phase="KERNEL_PHASE_RUNNING", health="KERNEL_HEALTH_HEALTHY", host="h", port=1
                )

            fetching = asyncio.create_task(fetch())
            async with aclosing(pieces):
                async for piece in pieces:
                    if piece.HasField("kernel"):
                        has = piece.kernel.HasField("pull")
                        told.append(piece.kernel.pull.layers[1].current_bytes if has else -1)
            await fetching
            assert told == [0, 500, -1]
            assert piece.outcome.result == endpoint_pb2.VALIDATION_RESULT_FINISHED

    with_program(tmp_path, body)
