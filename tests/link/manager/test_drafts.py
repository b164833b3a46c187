"""Endpoints made of requests, files, presets, images and runtimes, by a real manager."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from link.manager.inside import Inside, model_folder, with_inside

from dure.client import Client
from dure.v1 import folder_pb2
from dure.v1.endpoint_pb2 import (
    Endpoint,
    ExtraMount,
    HealthCheckOverride,
    RolloutPolicy,
    ServiceOverride,
    StartCommand,
)
from dure.wire import errors

DEFINITION = """
models:
  - name: simple
    model_path: /models
    service: {start_command: [serve, "{port}"], port: 8000, health_check: {path: /up}}
    metadata: {title: Simple, task: demo, framework: [none], min_resource: {cpu: 1}}
"""
SERVICE = """
[custom.environment]
image = "example.com/serve:1"
architecture = "x86_64"
[custom.resource_slots]
cpu = 2
mem = "2g"
"cuda.shares" = "0.5"
[custom.environ]
MODE = "file"
ONLY = "file"
[vllm.environment]
image = "example.com/vllm:1"
architecture = "x86_64"
"""


async def store(client: Client, place: Path, name: str, files: dict[str, str], usage: str = "MODEL") -> None:
    """A folder with these files; one that is there gets them over those it has."""
    place = place / name
    place.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text)
    if all([not found.name.endswith(f"/{name}") async for found in client.folders.list()]):
        await client.folders.create(name, folder_pb2.FolderUsage.Value(f"FOLDER_USAGE_{usage}"))
    await client.folders.upload(name, place)


def told(error: errors.InvalidInput) -> dict[str, str]:
    return {violation.field: violation.description for violation in error.violations}


def test_request_over_preset_over_service_definition_over_runtime(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client) -> None:
        await store(
            client, tmp_path, "m", {"model-definition.yml": DEFINITION, "service-definition.toml": SERVICE}
        )
        plain = (await client.endpoints.create("plain", model="m", replicas=0)).resolved
        assert dict(plain.resource_slots) == {"cpu": "2", "mem": str(2**31), "cuda.shares": "0.50"}
        assert dict(plain.environ) == {"MODE": "file", "ONLY": "file"}
        assert (plain.image, plain.architecture) == ("example.com/serve:1", "x86_64")
        assert (plain.port, plain.health_check_path) == (8000, "/up")
        assert plain.model_definition_path == "model-definition.yml"
        assert list(plain.start_command.args) == ["serve", "{port}"]

        await client.presets.create("small", resource_slots={"cpu": "1", "mem": "1g"}, shared_memory="512m")
        mixed = await client.endpoints.create(
            "mixed",
            model="m",
            replicas=0,
            preset="small",
            resource_slots={"mem": "3g", "cuda.device": "1"},
            environ={"MODE": "asked"},
            service=ServiceOverride(
                port=9000,
                start_command=StartCommand(line="exec serve 9000"),
                health_check=HealthCheckOverride(path="/ready"),
            ),
        )
        assert dict(mixed.resource_slots) == {"mem": str(3 * 2**30), "cuda.device": "1"}, (
            "only what was asked"
        )
        resolved = mixed.resolved
        assert dict(resolved.resource_slots) == {"cpu": "1", "mem": str(3 * 2**30), "cuda.device": "1"}
        assert dict(resolved.environ) == {"MODE": "asked", "ONLY": "file"}
        assert (resolved.port, resolved.health_check_path) == (9000, "/ready")
        assert resolved.start_command.line == "exec serve 9000"

        vllm = await client.endpoints.create("v", model="m", runtime="vllm", replicas=0)
        assert vllm.resolved.image == "example.com/vllm:1"
        assert vllm.resolved.model_definition_path == ""
        assert dict(vllm.resolved.environ) == {}, "the section of another runtime"

    with_inside(tmp_path / "manager", body)


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client) -> None:
        await store(
            client, tmp_path, "m", {"model-definition.yaml": "models: []", "service-definition.toml": "x"}
        )
        await store(client, tmp_path, "d", {"a/b": ""}, "DATA")
        with pytest.raises(errors.InvalidInput) as caught:
            await client.endpoints.create(
                "Bad",
                model="m",
                resource_slots={"cpu": "0"},
                environ={"PORT": "1"},
                resource_group="nope",
                preset="nope",
                shared_memory="1x",
                image="two words",
                architecture="amd64",
                priority=101,
                cluster_size=65,
                service=ServiceOverride(port=2200),
                rollout_policy=RolloutPolicy(max_surge="0"),
                extra_mounts=[
                    ExtraMount(folder="m"),
                    ExtraMount(folder="d", subpath="a/c"),
                    ExtraMount(folder="d", subpath="../m", target="/data"),
                    ExtraMount(folder="projects/other/folders/d", target="/data/x"),
                    ExtraMount(folder="none", target="/etc"),
                ],
            )
        found = told(caught.value)
        assert set(found) == {
            "endpoint_id",
            "endpoint.resource_slots[cpu]",
            "endpoint.environ[PORT]",
            "endpoint.resource_group",
            "endpoint.preset",
            "endpoint.shared_memory",
            "endpoint.image",
            "endpoint.architecture",
            "endpoint.priority",
            "endpoint.cluster_size",
            "endpoint.service.port",
            "endpoint.rollout_policy.max_surge",
            "endpoint.extra_mounts[0].folder",
            "endpoint.extra_mounts[1].subpath",
            "endpoint.extra_mounts[2].subpath",
            "endpoint.extra_mounts[3].folder",
            "endpoint.extra_mounts[3].target",
            "endpoint.extra_mounts[4].folder",
            "endpoint.extra_mounts[4].target",
            "model-definition.yaml:1: models",
            "service-definition.toml:1",
        }
        assert "usage model" in found["endpoint.extra_mounts[0].folder"]
        assert "no sub-folder `a/c`" in found["endpoint.extra_mounts[1].subpath"]
        assert "another project" in found["endpoint.extra_mounts[3].folder"]
        assert [endpoint async for endpoint in client.endpoints.list()] == []

    with_inside(tmp_path / "manager", body)


def test_mounts_are_kept_and_keep_their_folder(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client) -> None:
        await store(client, tmp_path, "m", {"model-definition.yaml": DEFINITION})
        await store(client, tmp_path, "d", {"a/b": ""}, "DATA")
        mounts = [
            ExtraMount(folder="projects/default/folders/d"),
            ExtraMount(folder="d", target="/data//a/", subpath="/a/", writable=True),
        ]
        made = await client.endpoints.create("e", model="m", replicas=0, extra_mounts=mounts)
        assert list(made.extra_mounts) == [
            ExtraMount(folder="d", target="/home/work/d"),
            ExtraMount(folder="d", target="/data/a", subpath="a", writable=True),
        ]
        with pytest.raises(errors.FailedPrecondition, match="mounted by `e`"):
            await client.folders.delete("d")
        await client.endpoints.delete("e")
        await client.endpoints.wait_gone("e", timeout_s=10)
        await client.folders.delete("d")

    with_inside(tmp_path / "manager", body)


def test_images_by_their_short_names(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client) -> None:
        await store(client, tmp_path, "m", {"model-definition.yaml": DEFINITION})
        await client.images.create(
            "serve",
            reference="example.com/serve:2",
            architecture="aarch64",
            runtimes=["custom", "cmd"],
            min_slots={"mem": "4g"},
        )
        big = {"mem": "4g"}
        made = await client.endpoints.create("e", model="m", replicas=0, image="serve", resource_slots=big)
        assert (made.image, made.resolved.image) == ("serve", "example.com/serve:2")
        assert made.resolved.architecture == "aarch64"
        with pytest.raises(errors.InvalidInput) as caught:
            await client.endpoints.create(
                "f", model="m", runtime="vllm", image="serve", architecture="x86_64"
            )
        assert told(caught.value) == {"endpoint.architecture": "image `serve` is for aarch64, not for x86_64"}
        with pytest.raises(errors.InvalidInput) as caught:
            await client.endpoints.create("f", model="m", runtime="vllm", image="serve")
        assert set(told(caught.value)) == {"endpoint.image", "endpoint.resource_slots[mem]"}
        with pytest.raises(errors.InvalidInput, match="did you mean `serve`"):
            await client.endpoints.create("f", model="m", image="server")
        with pytest.raises(errors.InvalidInput) as caught:
            await client.endpoints.create("f", model="m", runtime="cmd")
        assert set(told(caught.value)) == {"endpoint.service.port", "endpoint.image"}
        command = ServiceOverride(port=8000)
        made = await client.endpoints.create(
            "f", model="m", runtime="cmd", image="serve", service=command, resource_slots=big, replicas=0
        )
        assert not made.resolved.HasField("start_command")

    with_inside(tmp_path / "manager", body)


def test_groups_that_are_for_others(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client) -> None:
        await store(client, tmp_path, "m", {"model-definition.yaml": DEFINITION})
        await client.projects.create("other")
        await client.groups.create("theirs", allowed_projects=["other"])
        await client.groups.create("ours", allowed_projects=["default"])
        await client.presets.create("p", resource_slots={"cpu": "1"}, resource_group="ours")
        with pytest.raises(errors.InvalidInput, match="may not use the resource group `theirs`"):
            await client.endpoints.create("e", model="m", resource_group="theirs")
        with pytest.raises(errors.InvalidInput, match="is for the resource group `ours`, not for `default`"):
            await client.endpoints.create("e", model="m", preset="p")
        made = await client.endpoints.create("e", model="m", resource_group="ours", preset="p", replicas=0)
        assert made.resource_group == "ours"

    with_inside(tmp_path / "manager", body)


def test_updates_and_retries_make_revisions_of_what_changed(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client) -> None:
        await store(client, tmp_path, "m", {"model-definition.yaml": DEFINITION})
        await client.endpoints.create("e", model="m", replicas=0, environ={"A": "1"})
        same = await client.endpoints.update("e", environ={"A": "1"}, resource_group="default")
        assert same.revision == 1
        unshaped = await client.endpoints.update("e", priority=20, open_to_public=True)
        assert (unshaped.revision, unshaped.priority) == (1, 20)
        second = await client.endpoints.update("e", environ={"A": "2"})
        assert second.revision == 2
        assert (await client.endpoints.retry("e")).revision == 2
        await store(client, tmp_path, "m", {"model-definition.yaml": DEFINITION + "# a comment\n"})
        assert (await client.endpoints.retry("e")).revision == 2, "the same kernels"
        await store(client, tmp_path, "m", {"model-definition.yaml": DEFINITION.replace("/up", "/alive")})
        third = await client.endpoints.retry("e")
        assert (third.revision, third.resolved.health_check_path) == (3, "/alive")
        assert dict(third.environ) == {"A": "2"}
        revisions = [revision async for revision in client.endpoints.history("e")]
        assert [revision.number for revision in revisions] == [3, 2, 1]
        assert "/alive" in revisions[0].model_definition
        assert "/up" in revisions[1].model_definition
        assert revisions[1].change.startswith("environ.A 1 -> 2")
        await store(client, tmp_path, "m", {"model-definition.yaml": "models: 3"})
        with pytest.raises(errors.InvalidInput, match="found the number `3`"):
            await client.endpoints.update("e", environ={"A": "3"})
        with pytest.raises(errors.InvalidInput, match="found the number `3`"):
            await client.endpoints.retry("e")
        assert (await client.endpoints.get("e")).revision == 3

    with_inside(tmp_path / "manager", body)


def test_many_updates_at_once_are_all_made(tmp_path: Path) -> None:
    async def body(_: Inside, client: Client) -> None:
        await model_folder(client, tmp_path / "folder")
        await client.endpoints.create("e", model="m", replicas=0)
        made = await asyncio.gather(
            *(client.endpoints.update("e", environ={"N": str(number)}) for number in range(20))
        )
        assert sorted(endpoint.revision for endpoint in made) == list(range(2, 22))

    with_inside(tmp_path / "manager", body)


def test_gguf_files(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client) -> None:
        await store(client, tmp_path, "g", {"sub/a.gguf": "", "z.GGUF": "", "q.gguf": "", "a.txt": ""})
        made = await client.endpoints.create("e", model="g", runtime="llama-cpp", replicas=0)
        assert list(made.resolved.start_command.args)[-2:] == ["-m", "{model_path}/q.gguf"]

    with_inside(tmp_path / "manager", body)


def test_a_request_that_names_everything_is_shown_again(tmp_path: Path) -> None:
    async def body(running: Inside, client: Client) -> None:
        await store(client, tmp_path, "m", {"dir/own.yaml": DEFINITION})
        made = await client.endpoints.create(
            "e",
            model="projects/default/folders/m",
            model_definition_path="dir/own.yaml",
            model_mount_destination="/weights/",
            replicas=0,
            shared_memory="1g",
            resource_slots={"mem": "2g", "cpu": "1.50"},
            cluster_mode="multi-node",
            cluster_size=3,
            architecture="x86_64",
        )
        shown = await client.endpoints.get("e")
        for endpoint in (made, shown):
            assert endpoint.model == "projects/default/folders/m"
            assert endpoint.model_mount_destination == "/weights"
            assert endpoint.shared_memory == str(2**30)
            assert dict(endpoint.resource_slots) == {"mem": str(2**31), "cpu": "1.5"}
            assert (endpoint.cluster_size, endpoint.architecture) == (3, "x86_64")
            assert endpoint.resolved.model_definition_path == "dir/own.yaml"
        too_much = Endpoint(name=made.name, shared_memory="3g")
        with pytest.raises(errors.InvalidInput, match="more than the memory of a replica"):
            await client.endpoints.update("e", shared_memory=too_much.shared_memory)

    with_inside(tmp_path / "manager", body)
