"""`dure project|user|key|group|preset|image|context` as a program, beside a real manager."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import yaml
from link.client.dure_program import Dure
from link.manager.inside import Inside, model_folder, with_inside

from dure.client import Client
from dure.client.context import Context, load_context, save_context


def with_program(tmp_path: Path, body: Any) -> None:
    async def run(running: Inside, _admin: Client) -> None:
        context = tmp_path / "home" / "context.toml"
        save_context(context, Context(running.address, running.key))
        await body(Dure(context, tmp_path))

    with_inside(tmp_path / "manager", run, timeout_s=90)


def test_a_tenant_from_its_project_to_its_first_folder(tmp_path: Path) -> None:
    async def body(dure: Dure) -> None:
        made = await dure.ok("project", "create", "a", "--quota", "cuda.shares=2", "--max-endpoints", "5")
        assert "project a created" in made.out and "dure project add-member a" in made.out
        made = await dure.ok("user", "create", "alice", "--project", "a", "--role", "member", "-o", "json")
        assert made.json["memberships"] == [{"project": "a", "role": "MEMBER"}]
        secret = (await dure.ok("key", "create", "--user", "alice", "--label", "laptop", "-q")).out.strip()
        assert secret.startswith("dure_key_") and "\n" not in secret
        adding = ("context", "add", "alice", "--api-key", secret, "--project", "a")
        assert "`dure context use alice`" in (await dure.ok(*adding)).err
        assert (await dure(*adding)).code == 2
        who = await dure.ok("user", "whoami", "--context", "alice")
        assert "users/alice" in who.out and "a (member)" in who.out
        assert "`laptop`: all that its user may do" in who.out
        assert (await dure.ok("user", "whoami", "-q")).out == "admin\n"
        # The admin's context gets a name before it gives way.
        used = await dure.ok("context", "use", "alice")
        assert "kept as default" in used.err and "project a" in used.err
        shown, folder, listed = await asyncio.gather(
            dure.ok("context", "list"),
            dure.ok("folder", "create", "f", "--usage", "data", "-o", "name"),
            dure.ok("project", "list", "-o", "name"),
        )
        lines = [line.split()[:2] for line in shown.out.splitlines()[1:]]
        assert lines == [["*", "alice"], ["-", "default"]]
        assert folder.out == "projects/a/folders/f\n"
        assert listed.out == "projects/a\n"
        denied = await dure("folder", "list", "--project", "default")
        assert (denied.code, denied.out) == (4, "")
        assert "there is no project `default` that you have a role in" in denied.err
        assert "next: `dure user whoami`" in denied.err
        dure.environ["DURE_PROJECT"] = "default"
        assert (await dure("folder", "list")).code == 4
        # The option wins over the variable, and both over the context.
        assert "f" in (await dure.ok("folder", "list", "--project", "a")).out
        assert "projects/default" in (await dure.ok("project", "get", "--context", "default")).out
        del dure.environ["DURE_PROJECT"]
        for arguments in (("user", "list"), ("project", "create", "x"), ("group", "create", "g")):
            refused = await dure(*arguments)
            assert refused.code == 4 and "only an administrator may do this" in refused.err
        unknown = await dure("context", "use", "nope")
        assert unknown.code == 3 and "there are: alice, default" in unknown.err
        await dure.ok("context", "use", "default")
        assert load_context(tmp_path / "home" / "context.toml").project == "default"

    with_program(tmp_path, body)


def test_members_usage_and_trail(tmp_path: Path) -> None:
    async def body(dure: Dure) -> None:
        await dure.ok("project", "create", "a", "--quota", "cpu=8", "--quota", "mem=16g")
        await dure.ok("user", "create", "bob", "--project", "a", "--project", "default", "--role", "viewer")
        await dure.ok("project", "add-member", "a", "bob", "--role", "member")
        bob = await dure.ok("user", "get", "bob", "-o", "yaml")
        assert yaml.safe_load(bob.out)["memberships"] == [
            {"project": "a", "role": "MEMBER"},
            {"project": "default", "role": "VIEWER"},
        ]
        await dure.ok("project", "remove-member", "default", "bob")
        again = await dure("project", "remove-member", "default", "bob")
        assert again.code == 3 and "`dure user get bob`" in again.err
        table = (await dure.ok("user", "list")).out.splitlines()
        assert [line.split()[:4] for line in table[1:]] == [
            ["admin", "yes", "enabled", "all"],
            ["bob", "no", "enabled", "a"],
        ]
        await dure.ok("project", "update", "a", "--quota", "cpu=4", "--quota", "mem-")
        async with Client.from_context(tmp_path / "home" / "context.toml", project="a") as client:
            await model_folder(client, tmp_path / "folder")
            await client.endpoints.create("e", model="m", replicas=2, resource_slots={"cpu": "1"})
        usage, project, wide, audit, everything = await asyncio.gather(
            dure.ok("project", "usage", "a"),
            dure.ok("project", "get", "a"),
            dure.ok("project", "list", "-o", "wide"),
            dure.ok("project", "audit", "a", "-o", "json"),
            dure.ok("project", "audit", "--all", "--limit", "3"),
        )
        assert [line.split()[:3] for line in usage.out.splitlines()] == [
            ["SLOT", "USED", "QUOTA"],
            ["cpu", "2", "4"],
            ["mem", "2", "GiB"],
            ["endpoints", "1", "no"],
        ]
        assert "Quota:            cpu=4" in project.out and "mem" not in project.out
        assert "UID" in wide.out
        records: Any = audit.json["records"]
        assert [record["method"] for record in records][:2] == ["CreateEndpoint", "UploadFile"]
        assert {record["outcome"] for record in records} == {"OK"}
        assert "quota cpu=8, mem=17179869184 -> cpu=4" in [record["detail"] for record in records]
        assert len(everything.out.splitlines()) == 4 and "PROJECT" in everything.out
        deleted = await dure("project", "delete", "a")
        assert deleted.code == 5 and "1 endpoint, 1 folder, 1 member" in deleted.err
        usage_error = await dure(
            "user", "create", "x", "--project", "a", "--role", "member", "--role", "viewer"
        )
        assert usage_error.code == 2 and "one --role for all" in usage_error.err

    with_program(tmp_path, body)


def test_keys(tmp_path: Path) -> None:
    async def body(dure: Dure) -> None:
        made = await dure.ok("key", "create", "--label", "ci", "--role", "viewer", "--expires", "30d")
        assert made.out.startswith("dure_key_") and "as viewer only, until" in made.err
        await dure.ok("key", "create", "--project", "default", "-o", "json")
        listed = (await dure.ok("key", "list")).out
        assert "all that its user may do" in listed and "in project default only" in listed
        assert made.out.strip() not in listed
        await dure.ok("key", "delete", "ci")
        gone = await dure("key", "delete", "ci")
        assert gone.code == 3 and "you have no key `ci`" in gone.err and "next: `dure key list`" in gone.err
        last = (await dure.ok("key", "list", "-q")).out.split()[0]
        refused = await dure("key", "delete", last)
        assert refused.code == 5 and "last key of an administrator" in refused.err

    with_program(tmp_path, body)


def test_the_catalog(tmp_path: Path) -> None:
    async def body(dure: Dure) -> None:
        await dure.ok(
            "group", "create", "big", "--policy", "pack", "--allow", "default", "--profile", "strict"
        )
        await dure.ok(
            "preset", "create", "small", "-r", "cpu=1", "-r", "mem=2g", "--shm", "1g", "--group", "big"
        )
        await dure.ok(
            "image", "create", "server", "example.com/server:1", "--runtime", "vllm", "--min", "mem=1g"
        )
        group, preset, image = await asyncio.gather(
            dure.ok("group", "update", "big", "--allow-all", "-o", "json"),
            dure.ok("preset", "update", "small", "-r", "cpu=2", "-r", "mem-", "-o", "json"),
            dure.ok("image", "update", "server", "--all-runtimes", "--architecture", "aarch64", "-o", "json"),
        )
        assert (group.json["policy"], group.json["allowed_projects"]) == ("PACK", [])
        assert group.json["security_profile"] == "STRICT", "what was not said stays"
        assert preset.json["resource_slots"] == {"cpu": "2"}
        assert (image.json["runtimes"], image.json["architecture"]) == ([], "aarch64")
        groups, presets, images, one = await asyncio.gather(
            dure.ok("group", "list"),
            dure.ok("preset", "list"),
            dure.ok("image", "list", "-o", "yaml"),
            dure.ok("preset", "get", "small"),
        )
        header, row = groups.out.splitlines()[:2]
        assert row.split()[:4] == ["big", "pack", "0", "all"]
        assert "PROFILE" in header and "PROXY GROUP" not in header and "strict" in row.split()
        assert presets.out.splitlines()[1].split()[:4] == ["small", "cpu=2", "1", "GiB"]
        assert yaml.safe_load(images.out)["images"][0]["reference"] == "example.com/server:1"
        assert "Slots:            cpu=2" in one.out
        wrong = await dure("preset", "create", "x", "-r", "gpu=1", "-r", "cpu=0")
        assert wrong.code == 1 and "2 problems" in wrong.err
        assert "preset.resource_slots[gpu]: unknown slot" in wrong.err
        for kind, name in (("group", "big"), ("preset", "nope"), ("image", "nope")):
            ended = await dure(kind, "delete", name)
            assert ended.code == (5 if kind == "group" else 3), ended
        await dure.ok("preset", "delete", "small")
        await dure.ok("group", "delete", "big")

    with_program(tmp_path, body)
