"""A running manager and agents made here: accelerators that go and come back, enforcement, and profiles."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from link.manager.inside import Inside, model_folder, until, with_inside

from dure.client import Client
from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.v1 import admin_pb2, endpoint_pb2
from dure.v1.endpoint_pb2 import SECURITY_PROFILE_DEFAULT, SECURITY_PROFILE_STRICT
from dure.wire import errors
from dure.wire.channel import bearer, open_channel

HALF = {"cpu": "1", "mem": "1g", "cuda.shares": "0.5"}
STRICT = fleet_pb2.SECURITY_PROFILE_STRICT


def gpu(name: str, **fields: Any) -> fleet_pb2.Device:
    slots = {"cuda.shares": 1000, "cuda.device": 1000}
    return fleet_pb2.Device(id=name, **{"healthy": True, "slots": slots, **fields})


class Agent:
    """A stream to a manager, and what is wanted there."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.specs: dict[str, fleet_pb2.KernelSpec] = {}
        self.failure = ""

    async def follow(self) -> None:
        while True:
            try:
                message = await self.stream.read()
            except grpc.aio.AioRpcError as error:
                self.failure = str(error)
                return
            for spec in message.desired.kernels:
                self.specs[spec.uid] = spec
            for removal in message.desired.removals:
                self.specs.pop(removal.uid, None)
                await self.report(
                    uid=removal.uid, generation=removal.generation, phase=fleet_pb2.KERNEL_PHASE_GONE
                )

    async def say(self, **what: Any) -> None:
        await self.stream.write(fleet_pb2.ConnectRequest(**what))

    async def report(self, **status: Any) -> None:
        await self.say(observed=fleet_pb2.Observed(kernels=[fleet_pb2.KernelStatus(**status)]))

    async def devices(self, *devices: fleet_pb2.Device, limitations: Sequence[str] = ()) -> None:
        said = fleet_pb2.DevicesChanged(devices=devices, limitations=limitations)
        await self.say(devices_changed=said)

    async def spec_of(self, endpoint: str) -> fleet_pb2.KernelSpec:
        async def there() -> bool:
            return any(spec.endpoint == endpoint for spec in self.specs.values())

        await until(there)
        return next(spec for spec in self.specs.values() if spec.endpoint == endpoint)


@contextlib.asynccontextmanager
async def agent(running: Inside, admin: Client, name: str, **hello: Any) -> AsyncIterator[Agent]:
    token = (await admin.admin.create_join_token(admin_pb2.JOIN_ROLE_AGENT)).token
    async with open_channel(running.address) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        joined = await stub.Join(fleet_pb2.JoinRequest(agent=name), metadata=bearer(token), timeout=10)
        made = Agent(stub.Connect(metadata=bearer(joined.credential)))
        slots = {"cpu": 8000, "mem": 2**34 * 1000}
        said = {"protocol_version": 1, "backend": "test", "slots": slots, "maps_mounts": True, **hello}
        await made.say(hello=fleet_pb2.Hello(**said))
        await made.say(observed=fleet_pb2.Observed(complete=True))
        follower = asyncio.create_task(made.follow())
        try:
            yield made
        finally:
            follower.cancel()
            await asyncio.gather(follower, return_exceptions=True)
            made.stream.cancel()


async def waits_with(client: Client, name: str, *parts: str) -> None:
    """Until its replica is PENDING for a reason with these parts."""

    async def so() -> bool:
        replicas = (await client.endpoints.get(name)).replicas
        return any(
            replica.status == endpoint_pb2.REPLICA_STATUS_PENDING
            and all(part in replica.reason for part in parts)
            for replica in replicas
        )

    await until(so)


def test_a_gpu_that_falls_off_is_left_and_taken_again_when_it_is_back(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await model_folder(admin, tmp_path / "folder")
        async with agent(running, admin, "node-1", devices=[gpu("g0"), gpu("g1")]) as node:
            await admin.endpoints.create("e", model="m", resource_slots=HALF)
            spec = await node.spec_of("e")
            (granted,) = spec.devices
            other = "g1" if granted.device == "g0" else "g0"
            await node.report(
                uid=spec.uid,
                generation=1,
                phase=fleet_pb2.KERNEL_PHASE_RUNNING,
                health=fleet_pb2.KERNEL_HEALTH_HEALTHY,
                host="127.0.0.1",
                port=21000,
                enforcement="watchdog",
                enforcement_detail="no hook library is installed",
            )

            async def shown() -> bool:
                replica = (await admin.endpoints.get("e")).replicas[0]
                return (replica.enforcement, replica.kernels[0].enforcement_detail) == (
                    "watchdog",
                    "no hook library is installed",
                )

            await until(shown)
            # Both are sick now; the one in use ends its kernel.
            lost = "fell off the bus"
            sick = [gpu(granted.device, healthy=False, detail=lost), gpu(other, healthy=False)]
            await node.devices(*sick, limitations=["GPU 2 cannot be used"])
            ended = fleet_pb2.KernelExit(reason="DEVICE_LOST", code=-1, message=f"its GPU {lost}")
            await node.report(uid=spec.uid, generation=1, phase=fleet_pb2.KERNEL_PHASE_EXITED, exit=ended)
            await waits_with(admin, "e", "2 GPUs out of order", lost)
            endpoint = await admin.endpoints.get("e")
            assert not endpoint.errors, "a GPU that is lost is nobody's failure"
            shown_agent = await admin.agents.get("node-1")
            assert [device.healthy for device in shown_agent.devices] == [False, False]
            assert list(shown_agent.limitations) == ["GPU 2 cannot be used"]
            # It comes back by itself, and so does the replica.
            await node.devices(gpu("g0"), gpu("g1"))
            again = await node.spec_of("e")
            assert again.uid != spec.uid
            assert not (await admin.agents.get("node-1")).limitations
            events = [event async for event in admin.endpoints.events("e")]
            told = [(event.reason, event.message) for event in events if event.reason.startswith("DEVICE_")]
            assert ("DEVICE_LOST", f"node-1: GPU `{granted.device}` is out of order: {lost}") in told
            assert ("DEVICE_BACK", f"node-1: GPU `{other}` is in order again") in told
            # Nonsense ends the stream; what was said before stays.
            await node.devices(gpu("g0"), gpu("g0"))
            await until(lambda: _is(lambda: "one id" in node.failure))
            assert len((await admin.agents.get("node-1")).devices) == 2
        # An agent that comes again without one of them says so by its hello.
        (left,) = again.devices
        gone = "g1" if left.device == "g0" else "g0"
        async with agent(running, admin, "node-1", devices=[gpu(left.device)]):

            async def heard() -> bool:
                found = [event.message async for event in admin.endpoints.events("e")]
                return f"node-1: GPU `{gone}` is not there any more" in found

            await until(heard)

    with_inside(tmp_path / "manager", body)


async def _is(found: Any) -> bool:
    return bool(found())


def test_fragments_parts_and_enforcement_from_request_to_reason(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await model_folder(admin, tmp_path / "folder")
        devices = [
            gpu("g0", enforcement="none"),
            gpu("g1", enforcement="none"),
            gpu("p0", parent="g2", slots={"cuda.shares": 420}, enforcement="mig"),
        ]
        devices[0].peers.add(id="g1", distance=10)
        async with agent(running, admin, "node-1", devices=devices) as node:
            await admin.endpoints.create("pair", model="m", resource_slots={**HALF, "cuda.shares": "1.6"})
            spec = await node.spec_of("pair")
            assert [(d.device, d.amount) for d in spec.devices] == [("g0", 800), ("g1", 800)]
            assert (spec.require_enforcement, spec.serial_start, spec.cluster.one_node) == ("", False, True)
            await admin.endpoints.create(
                "part", model="m", require_enforcement="mig", resource_slots={**HALF, "cuda.shares": "0.3"}
            )
            spec = await node.spec_of("part")
            assert [(d.device, d.slot, d.amount) for d in spec.devices] == [("p0", "cuda.shares", 300)]
            assert spec.require_enforcement == "mig"
            shown = {device.id: device for device in (await admin.agents.get("node-1")).devices}
            assert (shown["p0"].parent, shown["p0"].enforcement, shown["p0"].shares) == ("g2", "mig", "0.42")
            assert shown["p0"].used_shares == "0.42", "a part is one kernel's alone"
            slots = {slot.slot: slot for slot in (await admin.agents.get("node-1")).slots}
            assert (slots["cuda.shares"].used, slots["cuda.shares"].capacity) == ("2.02", "2.42")

            await admin.endpoints.create("small", model="m", resource_slots={**HALF, "cuda.shares": "0.4"})
            await waits_with(admin, "small", "fragmented", "0.40 free, but in pieces of 0.20 and 0.20")
            tight = {**HALF, "cuda.shares": "0.2"}
            await admin.endpoints.create("kept", model="m", require_enforcement="hook", resource_slots=tight)
            await waits_with(admin, "kept", "2 GPUs have room, but enforce `none`, `hook` is required")
            explained = await admin.endpoints.explain("kept")
            assert "at least `hook`" in explained.request
            # The node finds a way to enforce: those that wait hear of it.
            for device in devices[:2]:
                device.enforcement = "hook"
            await node.devices(*devices)
            assert (await node.spec_of("kept")).require_enforcement == "hook"

            for slots_of, part in (
                ({"cuda.device": "1"}, "a whole GPU has no neighbours"),
                ({"cpu": "1"}, "requires `cuda.shares`"),
            ):
                with pytest.raises(errors.InvalidInput, match=part):
                    await admin.endpoints.create(
                        "bad", model="m", require_enforcement="mps", resource_slots=slots_of
                    )
            with pytest.raises(errors.InvalidInput, match="did you mean `watchdog`"):
                await admin.endpoints.update("kept", require_enforcement="watchdgo")

    with_inside(tmp_path / "manager", body)


def test_strict_is_what_the_endpoint_or_its_group_asks_for(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await model_folder(admin, tmp_path / "folder")
        async with agent(running, admin, "plain") as plain:
            await admin.endpoints.create("a", model="m", image_pull_policy="always")
            spec = await plain.spec_of("a")
            assert spec.security_profile == fleet_pb2.SECURITY_PROFILE_UNSPECIFIED
            assert spec.image_pull_policy == fleet_pb2.IMAGE_PULL_POLICY_ALWAYS
            await admin.endpoints.create("b", model="m", security_profile="strict")
            await waits_with(
                admin, "b", "plain: its back end cannot do the security profile `strict`", "endpoint"
            )
            await admin.groups.update("default", security_profile=SECURITY_PROFILE_STRICT)
            await admin.endpoints.create("c", model="m")
            await waits_with(admin, "c", "`strict`, which the resource group `default` asks for")
            profiles = [fleet_pb2.SECURITY_PROFILE_DEFAULT, STRICT]
            async with agent(running, admin, "able", security_profiles=profiles) as able:
                assert (await able.spec_of("b")).security_profile == STRICT
                assert (await able.spec_of("c")).security_profile == STRICT
                # What a kernel was given stays, whatever its group says later.
                await admin.groups.update("default", security_profile=SECURITY_PROFILE_DEFAULT)
                endpoint = await admin.endpoints.update("c", replicas=2)
                assert endpoint.security_profile == SECURITY_PROFILE_DEFAULT
                await until(lambda: _is(lambda: _profiles([able, plain], "c") == [0, int(STRICT)]))
                for name, mode, one_node in (("far", "multi-node", False), ("near", "single-node", True)):
                    await admin.endpoints.create(name, model="m", cluster_size=2, cluster_mode=mode)
                    known = [plain, able]
                    await until(lambda known=known, name=name: _is(lambda: len(_specs(known, name)) == 2))
                    assert [spec.cluster.one_node for spec in _specs(known, name)] == [one_node] * 2

    with_inside(tmp_path / "manager", body)


def test_agents_of_one_swarm_are_told_to_have_a_network_over_their_nodes(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await model_folder(admin, tmp_path / "folder")
        async with (
            agent(running, admin, "one", overlay="swarm-1", makes_overlay=True) as one,
            agent(running, admin, "two", overlay="swarm-1") as two,
        ):
            known = [one, two]
            for name, mode, overlay in (("far", "multi-node", True), ("near", "single-node", False)):
                await admin.endpoints.create(name, model="m", cluster_size=2, cluster_mode=mode)
                await until(lambda name=name: _is(lambda: len(_specs(known, name)) == 2))
                assert [spec.cluster.overlay for spec in _specs(known, name)] == [overlay] * 2

    with_inside(tmp_path / "manager", body)


def _profiles(agents: list[Agent], endpoint: str) -> list[int]:
    return sorted(int(spec.security_profile) for spec in _specs(agents, endpoint))


def _specs(agents: list[Agent], endpoint: str) -> list[fleet_pb2.KernelSpec]:
    return [spec for one in agents for spec in one.specs.values() if spec.endpoint == endpoint]


def test_a_session_without_an_image_waits_where_nodes_run_images(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await model_folder(admin, tmp_path / "folder")
        async with agent(running, admin, "boxes", runs_images=True, architecture="x86_64") as boxes:
            await admin.endpoints.create("a", model="m")
            await waits_with(admin, "a", "boxes: it runs sessions in images, and the endpoint has none")
            said = await admin.endpoints.explain("a")
            assert list(said.advice) == ["give it an image: dure endpoint update a --image IMAGE"]
            await admin.endpoints.update("a", image="example.com/a:1", architecture="x86_64")
            assert (await boxes.spec_of("a")).image == "example.com/a:1"
            await admin.endpoints.create("b", model="m", resource_slots={"cpu": "64"})
            async with agent(running, admin, "plain") as plain:
                # Of a mixed group those that run processes take it.
                await admin.endpoints.create("c", model="m")
                assert (await plain.spec_of("c")).image == ""
            said = await admin.endpoints.explain("b")
            assert said.advice[0] == "ask for less cpu: the largest node, boxes, has 8"

    with_inside(tmp_path / "manager", body)


def test_what_a_node_ended_is_kept_until_it_is_mended(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await model_folder(admin, tmp_path / "folder")
        async with agent(running, admin, "n") as node:
            await node.devices(gpu("g1"))
            await admin.endpoints.create("e", model="m", resource_slots=HALF)
            said = "it held 9 GiB of GPU g1"
            for count in (1, 2):
                uid = (await node.spec_of("e")).uid
                of = {"uid": uid, "generation": 1, "host": "127.0.0.1", "port": 9}
                running_phase, exited = fleet_pb2.KERNEL_PHASE_RUNNING, fleet_pb2.KERNEL_PHASE_EXITED
                await node.report(phase=running_phase, health=fleet_pb2.KERNEL_HEALTH_HEALTHY, **of)
                await until(lambda: _has_replica(admin, endpoint_pb2.REPLICA_STATUS_HEALTHY))
                ended = fleet_pb2.KernelExit(reason="GPU_MEMORY_EXCEEDED", code=-1, message=said)
                await node.report(phase=exited, exit=ended, **of)
                await until(lambda uid=uid: _is(lambda: uid not in node.specs))
                await until(lambda count=count: _has_errors(admin, count))
            found = await admin.endpoints.get("e")
            assert f"last error: replica {found.errors[-1].split()[3]} on n: {said}" in found.status_reason
            assert (await admin.endpoints.retry("e")).errors == []

    with_inside(tmp_path / "manager", body)


async def _has_replica(client: Client, status: endpoint_pb2.ReplicaStatus.ValueType) -> bool:
    return any(replica.status == status for replica in (await client.endpoints.get("e")).replicas)


async def _has_errors(client: Client, count: int) -> bool:
    return len((await client.endpoints.get("e")).errors) == count
