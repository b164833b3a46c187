"""Resource groups, presets and images, in a running manager."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
from link.manager.inside import Inside, model_folder, until, with_inside

from dure.client import Client
from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc
from dure.v1 import admin_pb2, endpoint_pb2
from dure.v1.catalog_pb2 import PLACEMENT_POLICY_PACK, PLACEMENT_POLICY_SPREAD
from dure.v1.endpoint_pb2 import SECURITY_PROFILE_DEFAULT, SECURITY_PROFILE_STRICT
from dure.v1.project_pb2 import ROLE_MEMBER
from dure.wire import errors
from dure.wire.channel import bearer, open_channel


async def refused(kind: type[errors.DureError], call: Awaitable[Any], *parts: str) -> None:
    with pytest.raises(kind) as caught:
        await call
    for part in parts:
        assert part in caught.value.message, caught.value.message


def test_a_group_of_ones_own_is_hidden_from_others(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        for name in "ab":
            await admin.projects.create(name)
            await admin.users.create(f"user-{name}", memberships={name: ROLE_MEMBER})
        made = await admin.groups.create(
            "big", policy=PLACEMENT_POLICY_PACK, allowed_projects=["b", "a", "default"], description="GPUs"
        )
        assert (made.policy, made.proxy_group, made.agents) == (PLACEMENT_POLICY_PACK, "default", 0)
        assert list(made.allowed_projects) == ["a", "b", "default"]
        await admin.groups.create("only-b", allowed_projects=["b"])
        await refused(errors.AlreadyExists, admin.groups.create("big"), "`big` already")
        key = await admin.keys.create(user="user-a")
        async with running.client(key.secret, "a") as alice:
            seen = [group async for group in alice.groups.list()]
            assert [group.name for group in seen] == ["resourceGroups/big", "resourceGroups/default"]
            # Names of others' projects are nobody's business.
            assert list(seen[0].allowed_projects) == ["a"]
            await refused(errors.NotFound, alice.groups.get("only-b"), "no resource group `only-b`")
            await refused(errors.NotFound, alice.groups.get("nope"), "no resource group `nope`")
            await refused(errors.PermissionDenied, alice.groups.update("big", allowed_projects=[]))
        changed = await admin.groups.update("big", policy=PLACEMENT_POLICY_SPREAD, allowed_projects=[])
        assert (changed.policy, len(changed.allowed_projects)) == (PLACEMENT_POLICY_SPREAD, 0)
        assert changed.description == "GPUs"
        assert changed.security_profile == SECURITY_PROFILE_DEFAULT
        changed = await admin.groups.update("big", security_profile=SECURITY_PROFILE_STRICT)
        assert (changed.security_profile, changed.description) == (SECURITY_PROFILE_STRICT, "GPUs")
        with pytest.raises(errors.InvalidInput, match="must be DEFAULT or STRICT"):
            await admin.groups.update("big", security_profile=7)  # type: ignore[arg-type]

    with_inside(tmp_path, body)


def test_a_group_appears_with_its_first_agent_and_stays_while_it_is_used(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        join = (await admin.admin.create_join_token(admin_pb2.JOIN_ROLE_AGENT)).token
        async with open_channel(running.address) as channel:
            stub = fleet_pb2_grpc.FleetServiceStub(channel)
            joined = await stub.Join(fleet_pb2.JoinRequest(agent="node-1"), metadata=bearer(join), timeout=10)
            stream = stub.Connect(metadata=bearer(joined.credential))
            hello = fleet_pb2.Hello(
                protocol_version=1, backend="test", resource_group="fresh", slots={"cpu": 4000}
            )
            await stream.write(fleet_pb2.ConnectRequest(hello=hello))
            await stream.read()
            group = await admin.groups.get("fresh")
            assert (group.policy, group.agents) == (PLACEMENT_POLICY_SPREAD, 1)
            assert not group.allowed_projects
            await refused(errors.FailedPrecondition, admin.groups.delete("fresh"), "agents", "`node-1`")
            # What an administrator made of it stays when the agent comes again.
            await admin.groups.update("fresh", policy=PLACEMENT_POLICY_PACK)
            stream.cancel()
            stream = stub.Connect(metadata=bearer(joined.credential))
            await stream.write(fleet_pb2.ConnectRequest(hello=hello))
            await stream.read()
            assert (await admin.groups.get("fresh")).policy == PLACEMENT_POLICY_PACK
            stream.cancel()
        await refused(errors.FailedPrecondition, admin.groups.delete("default"), "it stays")
        await admin.groups.create("spare")
        await model_folder(admin, tmp_path / "folder")
        await admin.endpoints.create("e", model="m", replicas=0, resource_group="spare")
        await admin.presets.create("small", {"cpu": "1"}, resource_group="spare")
        await refused(errors.FailedPrecondition, admin.groups.delete("spare"), "`e`", "`small`")
        await admin.presets.delete("small")
        await admin.endpoints.delete("e")

        async def gone() -> bool:
            return not [endpoint async for endpoint in admin.endpoints.list()]

        await until(gone)
        await admin.groups.delete("spare")
        await refused(errors.NotFound, admin.groups.get("spare"))

    with_inside(tmp_path / "manager", body)


def test_presets(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        made = await admin.presets.create("small", {"cpu": "2", "mem": "4g"}, shared_memory="1g")
        assert dict(made.resource_slots) == {"cpu": "2", "mem": str(4 << 30)}
        assert made.shared_memory == str(1 << 30)
        changed = await admin.presets.update("small", resource_slots={"cpu": "3"}, shared_memory="")
        assert (dict(changed.resource_slots), changed.shared_memory) == ({"cpu": "3"}, "")
        with pytest.raises(errors.InvalidInput, match="exclude each other"):
            await admin.presets.update("small", resource_slots={"cuda.shares": "1", "cuda.device": "1"})
        await refused(errors.AlreadyExists, admin.presets.create("small", {"cpu": "1"}))
        assert [preset.name async for preset in admin.presets.list()] == ["presets/small"]
        # What was made from it stays as it is.
        await model_folder(admin, tmp_path / "folder")
        await admin.endpoints.create("e", model="m", replicas=0, preset="small")
        await admin.presets.delete("small")
        endpoint = await admin.endpoints.get("e")
        assert endpoint.resolved.resource_slots["cpu"] == "3"
        await refused(errors.NotFound, admin.presets.get("small"), "dure preset list")

    with_inside(tmp_path / "manager", body)


def test_images(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        reference = "example.com:5000/team/model_server:1.0"
        made = await admin.images.create(
            "server", reference, "x86_64", runtimes=["vllm", "custom"], min_slots={"mem": "1g"}
        )
        assert (made.reference, list(made.runtimes)) == (reference, ["custom", "vllm"])
        await refused(errors.AlreadyExists, admin.images.create("server", "b", "x86_64"))
        await refused(errors.AlreadyExists, admin.images.create("other", reference, "x86_64"), "`server` has")
        await admin.images.create("arm", reference, "aarch64")
        await refused(errors.AlreadyExists, admin.images.update("arm", architecture="x86_64"))
        changed = await admin.images.update("server", reference=f"plain@sha256:{'0' * 64}", runtimes=[])
        assert (changed.reference, list(changed.runtimes)) == (f"plain@sha256:{'0' * 64}", [])
        for bad in ("", "UPPER", "a b", "-x", "x:", "x@sha256:12", "http://example.com/x", "x" * 500):
            with pytest.raises(errors.InvalidInput, match="reference"):
                await admin.images.create("bad", bad, "x86_64")
        assert [image.name async for image in admin.images.list()] == ["images/arm", "images/server"]
        await admin.images.delete("arm")
        await refused(errors.NotFound, admin.images.delete("arm"))

    with_inside(tmp_path, body)


def test_a_group_says_which_projects_may_use_it(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await admin.projects.create("a")
        await admin.groups.create("only-a", allowed_projects=["a"])
        await model_folder(admin, tmp_path / "folder")
        with pytest.raises(errors.InvalidInput, match="only-a"):
            await admin.endpoints.create("e", model="m", replicas=0, resource_group="only-a")
        await admin.groups.update("only-a", allowed_projects=["a", "default"])
        made = await admin.endpoints.create("e", model="m", replicas=0, resource_group="only-a")
        assert made.resource_group == "only-a"
        assert made.status == endpoint_pb2.ENDPOINT_STATUS_STOPPED

    with_inside(tmp_path / "manager", body)
