"""Projects, users, keys, quotas and the audit trail, in a running manager."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from link.manager.inside import Inside, model_folder, until, with_inside

from dure.client import Client
from dure.manager import retention, schema
from dure.manager.store import Store, new_uid, now_ms
from dure.v1 import folder_pb2
from dure.v1.project_pb2 import ROLE_ADMIN, ROLE_MEMBER, ROLE_VIEWER, AuditRecord
from dure.wire import errors, names


async def refused(kind: type[errors.DureError], call: Awaitable[Any], *parts: str) -> errors.DureError:
    with pytest.raises(kind) as caught:
        await call
    for part in parts:
        assert part in caught.value.message, caught.value.message
    return caught.value


async def someone(running: Inside, admin: Client, name: str, **memberships: Any) -> Client:
    """A client of a new user; `memberships` by project."""
    await admin.users.create(name, memberships=memberships)
    return running.client((await admin.keys.create(user=name)).secret, next(iter(memberships), "default"))


async def trail(client: Client, name: str | None = "") -> list[AuditRecord]:
    return [record async for record in client.projects.audit(name)]


def test_a_change_of_keys_users_and_roles_binds_at_once(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await admin.projects.create("a")
        async with await someone(running, admin, "alice", a=ROLE_MEMBER) as alice:
            await alice.folders.create("f", folder_pb2.FOLDER_USAGE_DATA)
            # From member to viewer, to nothing, and back.
            await admin.users.update("alice", memberships={"a": ROLE_VIEWER})
            assert [folder.name async for folder in alice.folders.list()] == ["projects/a/folders/f"]
            await refused(
                errors.PermissionDenied, alice.folders.delete("f"), "viewer of project `a`", "add-member a"
            )
            await admin.users.update("alice", memberships={})
            await refused(
                errors.PermissionDenied, alice.folders.get("f"), "no project `a` that you have a role"
            )
            assert [project async for project in alice.projects.list()] == []
            await admin.users.update("alice", memberships={"a": ROLE_MEMBER})
            await alice.folders.delete("f")
            await admin.users.update("alice", disabled=True)
            assert (await refused(errors.Unauthenticated, alice.users.caller())).reason == "USER_DISABLED"
            await admin.users.update("alice", disabled=False)
            key = (await alice.users.caller()).key
            await admin.keys.delete(key.name)
            await refused(errors.Unauthenticated, alice.users.caller(), "not an API key")
        short = await admin.keys.create(user="alice", ttl_s=0.5)
        async with running.client(short.secret, "a") as alice:
            assert (await alice.users.caller()).key.HasField("expire_time")

            async def expired() -> bool:
                with contextlib.suppress(errors.Unauthenticated):
                    await alice.users.caller()
                    return False
                return True

            await until(expired, 3)
            assert (await refused(errors.Unauthenticated, alice.users.caller())).reason == "KEY_EXPIRED"
        # A user that is deleted takes its keys with it.
        async with running.client((await admin.keys.create(user="alice")).secret) as alice:
            await alice.users.caller()
            await admin.users.delete("alice")
            await refused(errors.Unauthenticated, alice.users.caller())

    with_inside(tmp_path, body)


def test_a_stream_ends_with_what_allowed_it(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await admin.projects.create("a")
        keys = {}
        for how in ("key", "membership", "disabled", "expiry", "role"):
            await admin.users.create(how, memberships={"a": ROLE_MEMBER})
            keys[how] = await admin.keys.create(user=how, ttl_s=2.0 if how == "expiry" else None)
        opened = {how: asyncio.Event() for how in keys}

        async def watch(how: str) -> type[BaseException]:
            async with running.client(keys[how].secret, "a") as client:
                async with aclosing(client.endpoints.watch()) as batches:
                    assert (await anext(batches)).synced
                    opened[how].set()
                    try:
                        async with asyncio.timeout(10):
                            await anext(batches)
                    except Exception as error:
                        return type(error)
            raise AssertionError("nothing has changed that a watch would tell")

        watches = {how: asyncio.create_task(watch(how)) for how in keys}
        await asyncio.gather(*(event.wait() for event in opened.values()))
        started = time.monotonic()
        await admin.keys.delete(keys["key"].name)
        await admin.users.update("membership", memberships={})
        await admin.users.update("disabled", disabled=True)
        # A viewer may watch on.
        await admin.users.update("role", memberships={"a": ROLE_VIEWER})
        for how in ("key", "disabled", "expiry"):
            assert await watches[how] is errors.Unauthenticated, how
        assert await watches["membership"] is errors.PermissionDenied
        assert time.monotonic() - started < 9
        assert not watches["role"].done()
        watches["role"].cancel()
        await asyncio.gather(watches["role"], return_exceptions=True)

    with_inside(tmp_path, body)


def test_a_key_makes_no_key_that_can_do_more(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await admin.projects.create("a")
        for limits in ({"role": ROLE_VIEWER}, {"role": ROLE_MEMBER}, {"project": "a"}):
            key = await admin.keys.create(**limits)
            async with running.client(key.secret, "a") as limited:
                await refused(errors.PermissionDenied, limited.keys.create(), "can make no other")
                await refused(errors.PermissionDenied, limited.projects.create("mine"))
                others = [item.name async for item in limited.keys.list()]
                await refused(errors.PermissionDenied, limited.keys.delete(others[0]), "no key but itself")
                await limited.keys.delete(key.name)
        short = await admin.keys.create(ttl_s=3600)
        async with running.client(short.secret) as limited:
            await refused(errors.PermissionDenied, limited.keys.create(), "lasts longer")
            await refused(errors.PermissionDenied, limited.keys.create(ttl_s=7200), "lasts longer")
            await limited.keys.create(ttl_s=600)
        async with await someone(running, admin, "alice", a=ROLE_MEMBER) as alice:
            # ADMIN is a bound, not a promotion.
            key = await alice.keys.create(role=ROLE_ADMIN, label="mine")
            async with running.client(key.secret, "a") as again:
                await refused(errors.PermissionDenied, again.users.update("alice", admin=True))
                await refused(errors.PermissionDenied, again.keys.create(user="admin"), "is not you")
                await refused(errors.PermissionDenied, again.keys.create(project="default"))
            await refused(
                errors.FailedPrecondition,
                admin.keys.create(user="alice", project="default"),
                "would be good for nothing",
            )

    with_inside(tmp_path, body)


def test_the_last_administrator_stays(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        for call in (
            admin.users.delete("admin"),
            admin.users.update("admin", admin=False),
            admin.users.update("admin", disabled=True),
        ):
            assert (await refused(errors.FailedPrecondition, call)).reason == "LAST_ADMIN"
        own = (await admin.users.caller()).key.name
        assert (await refused(errors.FailedPrecondition, admin.keys.delete(own))).reason == "LAST_ADMIN_KEY"
        await admin.users.create("second", admin=True)
        await admin.users.update("second", disabled=True)
        await refused(errors.FailedPrecondition, admin.users.delete("admin"))
        await admin.users.update("second", disabled=False)
        async with running.client((await admin.keys.create(user="second")).secret) as second:
            await second.users.update("admin", admin=False)
            await refused(errors.PermissionDenied, admin.users.create("third"))
            await second.users.delete("admin")
            await refused(errors.FailedPrecondition, second.users.delete("second"))

    with_inside(tmp_path, body)


def test_everything_wrong_is_said_at_once(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        bad: list[tuple[Awaitable[Any], set[str]]] = [
            (
                admin.projects.create(
                    "Bad Name", quota_slots={"x": "1", "cuda.shares": "0.333"}, quota_endpoints=-1
                ),
                {
                    "project_id",
                    "project.quota_slots[x]",
                    "project.quota_slots[cuda.shares]",
                    "project.quota_endpoints",
                },
            ),
            (
                admin.users.create("B A D", memberships={"nope": ROLE_MEMBER, "default": ROLE_ADMIN}),
                {"user_id", "user.memberships[0].project", "user.memberships[1].role"},
            ),
            (admin.keys.create(label="x" * 300, ttl_s=-1), {"key.label", "ttl"}),
            (
                admin.groups.create("B G", allowed_projects=["nope"], proxy_group="!"),
                {"resource_group_id", "resource_group.allowed_projects[0]", "resource_group.proxy_group"},
            ),
            (
                admin.presets.create("P P", {"cpu": "x"}, shared_memory="1 parsec", resource_group="nope"),
                {
                    "preset_id",
                    "preset.resource_slots[cpu]",
                    "preset.shared_memory",
                    "preset.resource_group",
                },
            ),
            (
                admin.images.create("I I", "No Path", "z80", runtimes=["nope"], min_slots={"gpu": "1"}),
                {
                    "image_id",
                    "image.reference",
                    "image.architecture",
                    "image.runtimes[0]",
                    "image.min_slots[gpu]",
                },
            ),
            (admin.projects.update("default"), {"update_mask"}),
            (admin.users.update("admin"), {"update_mask"}),
            (admin.presets.create("p", {}), {"preset.resource_slots"}),
            (anext(admin.projects.audit(None, max_age_s=-1)), {"max_age"}),
        ]
        for call, fields in bad:
            with pytest.raises(errors.InvalidInput) as caught:
                await call
            assert {violation.field for violation in caught.value.violations} == fields

    with_inside(tmp_path, body)


def test_a_quota_holds_whoever_comes_at_once(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await admin.projects.create("a", quota_slots={"cuda.shares": "2", "cpu": "0"}, quota_endpoints=3)
        async with await someone(running, admin, "alice", a=ROLE_MEMBER) as alice:
            await model_folder(alice, tmp_path / "folder")
            slots = {"cpu": "1", "mem": "1g", "cuda.shares": "0.5"}

            async def create(name: str, replicas: int) -> Any:
                return await alice.endpoints.create(name, model="m", replicas=replicas, resource_slots=slots)

            error = await refused(
                errors.ResourceExhausted, create("e0", 1), "quota of project `a`", "cpu: the quota is 0"
            )
            assert error.reason == "QUOTA_EXCEEDED"
            await admin.projects.update("a", quota_slots={"cuda.shares": "2"})
            # Five want a quarter of the quota each, at the same time.
            ended = await asyncio.gather(
                *(create(f"e{number}", 1) for number in range(5)), return_exceptions=True
            )
            lost = [each for each in ended if isinstance(each, errors.ResourceExhausted)]
            assert len(lost) == 2 and "endpoints: the quota is 3" in lost[0].message
            living = [tail(endpoint.name) async for endpoint in alice.endpoints.list()]
            assert len(living) == 3
            await refused(
                errors.ResourceExhausted,
                alice.endpoints.update(living[0], replicas=3),
                "other endpoints use 1.00, and this one wants 1.50 (3 replicas x 0.50)",
                "dure project usage a",
            )
            await alice.endpoints.update(living[0], replicas=2)
            used = await alice.projects.usage()
            by_slot = {slot.slot: (slot.used, slot.quota) for slot in used.slots}
            assert by_slot["cuda.shares"] == ("2.00", "2.00")
            assert by_slot["cpu"] == ("4", "")
            assert (used.endpoints, used.quota_endpoints) == (3, 3)
            # Who is over a quota that was lowered may shrink.
            await admin.projects.update("a", quota_slots={"cuda.shares": "0.5"})
            await alice.endpoints.update(living[0], replicas=1)
            await alice.endpoints.update(living[0], open_to_public=True)
            await refused(errors.ResourceExhausted, alice.endpoints.update(living[0], replicas=2))
            await refused(errors.PermissionDenied, alice.projects.update("a", quota_slots={}))
            # Neither an earlier revision nor a file read again is a way around it.
            await admin.projects.update("a", quota_slots={})
            await alice.endpoints.update(living[0], resource_slots={"cpu": "2"})
            await alice.endpoints.update(living[0], resource_slots={"cpu": "1"})
            await admin.projects.update("a", quota_slots={"cpu": "1", "mem": "3g"})
            await refused(
                errors.ResourceExhausted, alice.endpoints.rollback(living[0], 2), "cpu: the quota is 1"
            )
            service = '[custom.environment]\nimage = "x/y:1"\narchitecture = "x86_64"\n'
            service += '[custom.resource_slots]\nmem = "9g"\n'
            (tmp_path / "folder" / "service-definition.toml").write_text(service)
            await alice.folders.upload("m", tmp_path / "folder")
            await refused(
                errors.ResourceExhausted, alice.endpoints.retry(living[0]), "mem: the quota is 3 GiB"
            )

    with_inside(tmp_path / "manager", body)


def tail(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def test_the_trail_says_who_changed_what_and_no_secret(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await admin.projects.create("a")
        await admin.projects.create("b")
        async with await someone(running, admin, "alice", a=ROLE_MEMBER) as alice:
            folder = tmp_path / "folder"
            folder.mkdir()
            for number in range(40):
                (folder / f"file-{number:02}").write_text("x")
            await model_folder(alice, folder)
            environ = {"PASSWORD": "hunter2", "MODE": "calm"}
            await alice.endpoints.create("e", model="m", replicas=0, environ=environ)
            await alice.endpoints.update("e", replicas=1)
            await alice.endpoints.update("e", environ={"PASSWORD": "hunter3", "MODE": "calm"})
            token = await alice.tokens.create("e", timedelta(hours=1), "for tests")
            secret = (await alice.tokens.get(token.uid, "e")).secret
            bad = {"PASSWORD": "hunter4\0", "PORT": "hunter5"}
            await refused(errors.InvalidInput, alice.endpoints.update("e", environ=bad))
            await refused(errors.PermissionDenied, alice.projects.delete("a"))
            await refused(errors.PermissionDenied, alice.folders.delete("projects/b/folders/f"))
            key = await alice.keys.create(label="mine")
            own = await trail(alice)
            told = [(record.method, record.actor, record.outcome) for record in own]
            assert ("UpdateEndpoint", "alice", "OK") in told
            assert ("UpdateEndpoint", "alice", "INVALID_ARGUMENT") in told
            assert ("DeleteProject", "alice", "PERMISSION_DENIED") in told
            assert told[-1] == ("CreateProject", "admin", "OK")
            assert {record.project for record in own} == {"a"}
            details = {record.method: record.detail for record in reversed(own) if record.outcome == "OK"}
            uploads = [record for record in own if record.method == "UploadFile"]
            assert 1 <= len(uploads) < 10
            files = sum(_files(record.detail) for record in uploads)
            assert files == 41
            assert any("replica_count 0 -> 1" in record.detail for record in own)
            assert "environ.PASSWORD" in details["UpdateEndpoint"]
            assert uploads[0].resource == "projects/a/folders/m" and uploads[0].peer.startswith("ipv4:")
            # What was tried on another project is in that one's trail, and its own members see it.
            other = await trail(admin, "b")
            assert [(each.method, each.actor, each.outcome) for each in other] == [
                ("DeleteFolder", "alice", "PERMISSION_DENIED"),
                ("CreateProject", "admin", "OK"),
            ]
            await refused(errors.PermissionDenied, trail(alice, None), "administrator's key")
            whole = await trail(admin, None)
            text = "\n".join(str(record) for record in whole)
            for hidden in ("hunter", secret, key.secret, running.key):
                assert hidden not in text
            assert {record.method for record in whole} >= {"CreateUser", "CreateApiKey", "CreateToken"}
            newest = [record async for record in admin.projects.audit(None, max_age_s=0.001)]
            assert len(newest) < len(whole)

    with_inside(tmp_path / "manager", body)


def _files(detail: str) -> int:
    _, _, more = detail.partition(" and ")
    return 1 + (int(more.split()[0]) if more else 0)


def test_a_trail_outlives_a_restart_and_not_its_bound(tmp_path: Path) -> None:
    async def first(running: Inside, admin: Client) -> None:
        await admin.projects.create("a")

    async def second(running: Inside, admin: Client) -> None:
        assert [record.method for record in await trail(admin, "a")] == ["CreateProject"]
        # Of an earlier project of the same name nothing is told.
        await admin.projects.delete("a")
        await admin.projects.create("a")
        assert [record.method for record in await trail(admin, "a")] == ["CreateProject"]

    with_inside(tmp_path, first)
    with_inside(tmp_path, second)

    async def prune() -> None:
        store = Store(tmp_path / "dure.db")
        await store.open()
        try:
            old = names.new_uid(now_ms() - retention.AUDIT_KEPT_MS - 1000, 0)
            async with store.write() as tx:
                await tx.session.execute(
                    schema.AuditRecord.__table__.insert(),
                    [record(new_uid()) for _ in range(retention.AUDIT_MAX + 500)] + [record(old)],
                )
            await retention.prune(store)
            async with store.read() as session:
                uids = sorted(await session.scalars(schema.AuditRecord.__table__.select()))
            assert len(uids) == retention.AUDIT_MAX and old not in uids
        finally:
            await store.close()

    def record(uid: str) -> dict[str, Any]:
        texts = ("actor", "key_uid", "project", "method", "resource", "detail", "outcome", "peer")
        return {"uid": uid, "time_ms": 0, **dict.fromkeys(texts, "")}

    asyncio.run(prune())


def test_a_project_goes_only_when_it_is_empty(tmp_path: Path) -> None:
    async def body(running: Inside, admin: Client) -> None:
        await admin.projects.create("a")
        await admin.groups.create("g", allowed_projects=["a"])
        async with await someone(running, admin, "alice", a=ROLE_MEMBER) as alice:
            await alice.folders.create("f", folder_pb2.FOLDER_USAGE_DATA)
            await refused(errors.FailedPrecondition, admin.projects.delete("a"), "1 folder, 1 member")
            await alice.folders.delete("f")
            await admin.users.update("alice", memberships={})
            await refused(errors.FailedPrecondition, admin.projects.delete("a"), "group `g` is for project")
            await admin.groups.update("g", allowed_projects=["a", "default"])
            await admin.projects.delete("a")
            assert (await admin.groups.get("g")).allowed_projects == ["default"]
            await refused(errors.PermissionDenied, alice.folders.get("f"))
            await refused(errors.NotFound, admin.projects.get("a"))
            await refused(errors.AlreadyExists, admin.projects.create("default"))

    with_inside(tmp_path, body)
