"""Registries of a real manager: who may keep credentials, who gets them, and that nobody else sees one."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc.aio
import pytest
from link.manager.inside import model_folder
from link.manager.reporting_agent import agent, agent_again, serve, with_program
from link.manager.test_manager_program import Manager

from dure.client import Client
from dure.manager import registry_api
from dure.v1 import project_pb2, registry_pb2, registry_pb2_grpc
from dure.wire import errors
from dure.wire.channel import bearer, open_channel

HOST = "registry.example.com:5000"
IMAGE = f"{HOST}/team/server:1"
PASSWORD = "correct-horse-battery-staple"
OTHER_PASSWORD = '{\n  "key": "tuna-umbrella-walrus-kettle"\n}'


def test_an_agent_gets_the_credential_of_its_own_kernels_image(tmp_path: Path) -> None:
    async def body(manager: Manager, client: Client) -> None:
        await model_folder(client, tmp_path / "folder")
        await client.registries.set(HOST.upper(), "robot", PASSWORD)
        await client.registries.set("index.docker.io", "hub", OTHER_PASSWORD)
        async with agent(manager, client, "a") as one, agent(manager, client, "b") as two:
            await client.agents.drain("b")
            for name, image in (("private", IMAGE), ("hub", "vllm/server:1"), ("open", "ghcr.io/me/s:1")):
                await serve(client, name, image)
            private, hub, open_ = [await one.kernel(name) for name in ("private", "hub", "open")]
            assert private.image == IMAGE
            assert await one.storage.image_credential(private.uid) == ("robot", PASSWORD)
            assert await one.storage.image_credential(hub.uid) == ("hub", OTHER_PASSWORD)
            assert await one.storage.image_credential(open_.uid) == ("", "")
            # Not another agent's, not one that does not exist, and the same words for both.
            said = []
            for uid in (private.uid, "01990000-0000-7000-8000-000000000000"):
                with pytest.raises(errors.PermissionDenied) as refused:
                    await two.storage.image_credential(uid)
                said.append(str(refused.value).replace(uid, "UID"))
            assert said[0] == said[1]
            # As it is now, not as it was when the endpoint was made.
            await client.registries.set(HOST, "robot-2", OTHER_PASSWORD)
            assert await one.storage.image_credential(private.uid) == ("robot-2", OTHER_PASSWORD)
            await client.registries.delete(HOST)
            assert await one.storage.image_credential(private.uid) == ("", "")
            await client.registries.set(HOST, "robot", PASSWORD)
            # Another project's credential is not for this one's images.
            await client.projects.create("elsewhere")
            async with Client(manager.address, manager.key, "elsewhere") as other:
                await other.registries.set("ghcr.io", "other", PASSWORD)
            assert await one.storage.image_credential(open_.uid) == ("", "")
            # What is gone needs no image any more.
            await client.endpoints.delete("private")
            await one.report(private, phase="KERNEL_PHASE_GONE")
            async with asyncio.timeout(10):
                with pytest.raises(errors.PermissionDenied):
                    while True:
                        await one.storage.image_credential(private.uid)
                        await asyncio.sleep(0.05)

    with_program(tmp_path, body)


def test_who_may_do_what_and_what_is_kept(tmp_path: Path) -> None:
    async def body(manager: Manager, client: Client) -> None:
        secrets = {}
        for name, role in (("member", project_pb2.ROLE_MEMBER), ("viewer", project_pb2.ROLE_VIEWER)):
            await client.users.create(name, memberships={"default": role})
            secrets[name] = (await client.keys.create(user=name)).secret
        async with (
            Client(manager.address, secrets["member"]) as member,
            Client(manager.address, secrets["viewer"]) as viewer,
        ):
            item = await member.registries.set("GHCR.io", "me", PASSWORD)
            assert (item.name, item.username, item.password) == (
                "projects/default/registries/ghcr.io",
                "me",
                "",
            )
            await member.registries.set(HOST, "robot", PASSWORD)
            again = await member.registries.set("ghcr.io", "you", OTHER_PASSWORD)
            assert again.create_time == item.create_time
            assert again.update_time.ToNanoseconds() > item.update_time.ToNanoseconds()
            listed = [one async for one in viewer.registries.list()]
            found = [(one.name.rsplit("/")[-1], one.username, one.password) for one in listed]
            assert found == [("ghcr.io", "you", ""), (HOST, "robot", "")]
            with pytest.raises(errors.PermissionDenied):
                await viewer.registries.set("ghcr.io", "me", PASSWORD)
            with pytest.raises(errors.PermissionDenied):
                await viewer.registries.delete("ghcr.io")
            await member.registries.delete("Ghcr.io")
            with pytest.raises(errors.NotFound, match="dure registry list"):
                await member.registries.delete("ghcr.io")
            with pytest.raises(errors.InvalidInput, match=r"that images name: ghcr\.io"):
                await member.registries.set("https://ghcr.io/v2", "me", PASSWORD)

    with_program(tmp_path, body)


def test_what_is_wrong_is_told_without_the_password(tmp_path: Path) -> None:
    async def body(manager: Manager, client: Client) -> None:
        long = PASSWORD + "x" * registry_api.PASSWORD_BYTES_MAX
        wrong: dict[tuple[str, str, str], set[str]] = {
            ("ghcr.io", "", ""): {"registry.username", "registry.password"},
            ("ghcr.io", "a:b", PASSWORD): {"registry.username"},
            ("ghcr.io", "a\nb", PASSWORD): {"registry.username"},
            ("ghcr.io", "a" * 256, PASSWORD): {"registry.username"},
            ("ghcr.io", "a", PASSWORD + "\0"): {"registry.password"},
            ("ghcr.io", "a", long): {"registry.password"},
            ("nohost", "a", PASSWORD): {"registry.name"},
            ("gh cr.io", "a", PASSWORD): {"registry.name"},
        }
        async with open_channel(manager.address) as channel:
            stub = registry_pb2_grpc.RegistryServiceStub(channel)
            for (host, username, password), fields in wrong.items():
                registry = registry_pb2.Registry(
                    name=f"projects/default/registries/{host}", username=username, password=password
                )
                request = registry_pb2.SetRegistryRequest(registry=registry)
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.SetRegistry(request, metadata=bearer(manager.key), timeout=10)
                error = errors.from_rpc(caught.value)
                assert isinstance(error, errors.InvalidInput), error
                assert {violation.field for violation in error.violations} == fields
                assert PASSWORD not in str(caught.value) + str(error)
        for number in range(registry_api.REGISTRIES_MAX):
            await client.registries.set(f"r{number}.example.com", "a", PASSWORD)
        with pytest.raises(errors.ResourceExhausted, match="100 registries already"):
            await client.registries.set("one.more.example.com", "a", PASSWORD)
        await client.registries.set("r7.example.com", "b", PASSWORD)
        assert len([one async for one in client.registries.list()]) == registry_api.REGISTRIES_MAX
        # They go with their project.
        await client.projects.create("p")
        async with Client(manager.address, manager.key, "p") as other:
            await other.registries.set("ghcr.io", "a", PASSWORD)
            await client.projects.delete("p")
            await client.projects.create("p")
            assert [one async for one in other.registries.list()] == []

    with_program(tmp_path, body)


def test_a_password_is_nowhere_to_be_seen(tmp_path: Path) -> None:
    async def body(manager: Manager, client: Client) -> None:
        await model_folder(client, tmp_path / "folder")
        assert not (manager.data_dir / "manager" / "seal.key").exists()
        await client.registries.set(HOST, "robot", PASSWORD)
        await client.registries.set("docker.io", "robot", OTHER_PASSWORD)
        with pytest.raises(errors.InvalidInput):
            await client.registries.set("docker.io", "a:b", OTHER_PASSWORD)
        async with agent(manager, client, "a") as running:
            await serve(client, "private", IMAGE)
            spec = await running.kernel("private")
            assert await running.storage.image_credential(spec.uid) == ("robot", PASSWORD)
        assert (manager.data_dir / "manager" / "seal.key").stat().st_mode & 0o777 == 0o600
        records = [record async for record in client.projects.audit()]
        mine = [
            (record.method, record.resource, record.outcome)
            for record in records
            if "Registr" in record.method
        ]
        assert ("SetRegistry", f"projects/default/registries/{HOST}", "OK") in mine
        assert ("SetRegistry", "projects/default/registries/docker.io", "INVALID_ARGUMENT") in mine
        events = [event async for event in client.endpoints.events("private")]
        shown = str(records) + str(events) + str(await client.endpoints.get("private"))
        needles = [PASSWORD, "tuna-umbrella", json.dumps(OTHER_PASSWORD)]
        assert not [needle for needle in needles if needle in shown]
        # The store with its journal, the log (of debugging), the settings: no file has it.
        files = [path for path in manager.data_dir.rglob("*") if path.is_file()]
        assert {"dure.db", "dure.db-wal", "log"} <= {path.name for path in files}
        holding = [path for path in files for needle in needles if needle.encode() in path.read_bytes()]
        assert holding == []
        # Without its key the store tells nobody, and says what to do.
        (manager.data_dir / "manager" / "seal.key").rename(tmp_path / "moved.key")
        assert manager.end() == 0
        manager.start()
        async with agent_again(manager, running.credential) as running:
            with pytest.raises(errors.FailedPrecondition, match="bring it back from a backup"):
                await running.storage.image_credential(spec.uid)
            await client.registries.set(HOST, "robot", OTHER_PASSWORD)
            assert await running.storage.image_credential(spec.uid) == ("robot", OTHER_PASSWORD)

    with_program(tmp_path, body)
