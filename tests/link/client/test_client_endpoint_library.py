"""`client.endpoints` of revisions, validations and events; `apply_manifest`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import cast

import pytest
from link.client.fake_manager import KEY, FakeManager, fake_manager, until
from link.client.fake_trials import pieces

from dure.client.apply import apply_manifest
from dure.client.client import Client
from dure.client.manifest_reader import read_manifests
from dure.client.wanted import ClusterMode
from dure.v1 import endpoint_pb2, folder_pb2
from dure.v1.endpoint_pb2 import CanaryStep, ExtraMount, RolloutPolicy, ServiceOverride, StartCommand
from dure.wire.errors import Conflict, DureError, InvalidInput, ManagerUnreachable, NotFound

CHAT = "projects/default/endpoints/chat"


def with_client(body: Callable[[FakeManager, Client], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(20), fake_manager() as fake:
            async with Client(fake.address, KEY, retry_s=3.0) as client:
                await client.folders.create("m", folder_pb2.FOLDER_USAGE_MODEL)
                await body(fake, client)

    asyncio.run(run())


def test_fields_arrive_and_only_those_that_were_given() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        await client.endpoints.create(
            "chat",
            model="m",
            replicas=2,
            environ={"A": "1"},
            cluster_mode="multi-node",
            extra_mounts=[ExtraMount(folder="d")],
            service=ServiceOverride(start_command=StartCommand(line="serve"), port=81),
            rollout_policy=RolloutPolicy(steps=[CanaryStep(weight=5)]),
        )
        item = fake.endpoints[CHAT]
        assert (item.cluster_mode, item.service.port) == (endpoint_pb2.CLUSTER_MODE_MULTI_NODE, 81)
        tried = await client.endpoints.update("chat", environ={}, dry_run=True)
        assert tried.revision == 2 and not tried.environ and item.environ
        await client.endpoints.update("chat", environ={}, priority=5)
        assert list(fake.updates[0].update_mask.paths) == ["environ", "priority"]
        assert (dict(item.environ), item.priority, item.service.port) == ({}, 5, 81)
        with pytest.raises(InvalidInput, match="none of: multi-node, single-node"):
            await client.endpoints.update("chat", cluster_mode=cast(ClusterMode, "many"))

    with_client(body)


def test_a_wait_for_a_revision_says_why_it_was_not_kept() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        await client.endpoints.create("chat", model="m")
        changed = await client.endpoints.update("chat", image="b")
        waiting = asyncio.create_task(client.endpoints.wait("chat", timeout_s=10, revision=changed.revision))
        await until(lambda: fake.watches)
        fake.revisions[CHAT][1].reason = "no progress for 5 s"
        back = await client.endpoints.rollback("chat")
        with pytest.raises(DureError, match=r"revision 2 .* was not kept; now it is 1: no progress for 5 s"):
            await waiting
        assert [item.number async for item in client.endpoints.history("chat")] == [2, 1]
        waiting = asyncio.create_task(client.endpoints.wait("chat", timeout_s=10, revision=back.revision))
        await until(lambda: fake.watches)
        fake.set("chat", "HEALTHY")
        assert (await waiting).revision == 1

    with_client(body)


def test_steps_and_rollbacks_are_not_repeated_after_a_lost_answer() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        await client.endpoints.create("chat", model="m")
        for image in ("b", "c"):
            await client.endpoints.update("chat", image=image)
        fake.unavailable = ["RollbackEndpoint"]
        with pytest.raises(ManagerUnreachable):
            await client.endpoints.rollback("chat")
        fake.unavailable = ["RollbackEndpoint"]
        assert (await client.endpoints.rollback("chat", 1)).revision == 1
        assert fake.calls.count("RollbackEndpoint") == 3

    with_client(body)


def test_closing_a_validation_ends_its_session() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        fake.validation = pieces("FINISHED", "HEALTHY")[:2]
        async with aclosing(client.endpoints.validate("try", model="m", timeout_s=7)) as stream:
            assert (await anext(stream)).event.reason == "REPLICA_PLACED"
            assert fake.sessions == 1
        await until(lambda: fake.sessions == 0)
        request = fake.validations[0]
        assert (request.endpoint_id, request.timeout.seconds, request.endpoint.runtime) == (
            "try",
            7,
            "custom",
        )
        with pytest.raises(NotFound, match="no folder `nope`"):
            await anext(client.endpoints.validate(model="nope"))

    with_client(body)


def test_events_are_followed_through_a_restart_of_the_manager() -> None:
    async def run() -> None:
        async with asyncio.timeout(20):
            fake = FakeManager()
            async with fake_manager(fake=fake):
                port = int(fake.address.rsplit(":", 1)[1])
                client = Client(fake.address, KEY, retry_s=0.3)
                await client.folders.create("m", folder_pb2.FOLDER_USAGE_MODEL)
                await client.endpoints.create("chat", model="m")
                events = fake.events.setdefault(CHAT, [])
                events.append(endpoint_pb2.Event(name="1", reason="ONE"))
                news = client.endpoints.follow_events("chat")
                assert (await anext(news)).reason == "ONE"
            following = asyncio.ensure_future(anext(news))
            events.insert(0, endpoint_pb2.Event(name="2", reason="TWO"))
            # Long enough that it has asked in vain.
            done, _ = await asyncio.wait([following], timeout=1.5)
            assert not done
            async with client, fake_manager(port, fake):
                assert (await following).reason == "TWO"
                fake.remove("chat")
                assert [event async for event in news] == []

    asyncio.run(run())


def test_a_manifest_is_applied_only_where_it_differs() -> None:
    async def body(fake: FakeManager, client: Client) -> None:
        [manifest] = read_manifests("name: chat\nmodel: m\nenviron: {A: '1'}\n", "f")
        made = await apply_manifest(client, manifest)
        assert made.before is None and made.after.replica_count == 1
        same = await apply_manifest(client, manifest)
        assert same.before is not None and same.before.etag == same.after.etag and not fake.updates
        [other] = read_manifests("name: chat\nmodel: m\nreplicas: 3\n", "f")
        assert dict((await apply_manifest(client, other)).after.environ) == {}
        assert fake.endpoints[CHAT].replica_count == 3

        def interfere() -> None:
            fake.endpoints[CHAT].etag = "77"

        fake.before_update = [interfere]
        with pytest.raises(Conflict):
            await apply_manifest(client, manifest)

    with_client(body)
