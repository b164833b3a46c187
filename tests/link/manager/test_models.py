"""`dure folder check|model|runtime` and their calls, beside a real manager; local directories without one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from link.client.dure_program import Dure
from link.manager.inside import Inside, with_inside

from dure.client import Client
from dure.client.context import Context, save_context
from dure.manager.model_api import endpoint_id_of
from dure.v1 import catalog_pb2, folder_pb2
from dure.v1.endpoint_pb2 import StartCommand
from dure.wire import errors

DEFINITION = """
models:
  - name: simple
    model_path: /models
    service: {start_command: [serve, "{port}"], port: 8000}
    metadata: {title: Simple, task: demo, framework: [none], min_resource: {cpu: 1}}
"""
SERVICE = """
[sglang.environment]
image = "example.com/sglang:1"
architecture = "x86_64"
[custom.environment]
image = "example.com/serve:1"
architecture = "x86_64"
[custom.resource_slots]
mem = "2g"
"""
GOOD = {"model-definition.yaml": DEFINITION, "service-definition.toml": SERVICE}
BAD = {
    "model-definition.yml": "models:\n- name: m\n  modelpath: /m\n",
    "service-definition.toml": SERVICE + "cuda.shares = 1\n[vlm.environ]\n",
}
PROBLEMS = [
    "model-definition.yml:2: models[0].model_path: is required",
    "model-definition.yml:3: models[0].modelpath: unknown key; did you mean `model_path`?",
    "service-definition.toml:10: custom.resource_slots.cuda.shares: the dot makes a section of its own of "
    '`cuda`; put the key in quotes, as in "cuda.shares" = "0.5"',
    "service-definition.toml:11: vlm: unknown runtime `vlm`; did you mean `vllm`?",
    "service-definition.toml:11: vlm.environment: is required: [vlm.environment] with `image` and "
    "`architecture`",
]


def write(place: Path, files: dict[str, str]) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        (place / path).write_text(text)
    return place


async def store(client: Client, place: Path, files: dict[str, str]) -> None:
    await client.folders.create(place.name, folder_pb2.FOLDER_USAGE_MODEL)
    await client.folders.upload(place.name, write(place, files))


def with_program(tmp_path: Path, body: Any) -> None:
    async def run(running: Inside, client: Client) -> None:
        context = tmp_path / "home" / "context.toml"
        save_context(context, Context(running.address, running.key))
        await body(Dure(context, tmp_path), client)

    with_inside(tmp_path / "manager", run, timeout_s=90)


def test_a_local_directory_needs_no_manager(tmp_path: Path) -> None:
    async def run() -> None:
        dure = Dure(tmp_path / "no-context", tmp_path)
        write(tmp_path / "good", GOOD)
        write(tmp_path / "bad", BAD)
        (tmp_path / "empty").mkdir()
        good, bad, empty, none, json = await asyncio.gather(
            dure("folder", "check", "./good"),
            dure("folder", "check", "bad/"),
            dure("folder", "check", "--local", "empty"),
            dure("folder", "check", "./none"),
            dure("folder", "check", str(tmp_path / "bad"), "-o", "json"),
        )
        assert (good.code, good.err) == (0, "")
        assert good.out == "./good is right: model-definition.yaml, service-definition.toml\n"
        assert bad.code == 1
        assert bad.out.splitlines() == [*PROBLEMS, "5 problems in bad/"]
        assert empty.code == 1
        assert (
            "model-definition.yaml: there is no such file in the folder, nor `model-definition.yml`"
            in empty.out
        )
        assert (none.code, none.out) == (3, "")
        assert "there is no directory `none`" in none.err
        assert json.code == 1
        assert json.json["files"] == ["model-definition.yml", "service-definition.toml"]
        problems: Any = json.json["problems"]
        assert problems[0] == {
            "file": "model-definition.yml",
            "line": 2,
            "key": "models[0].model_path",
            "message": "is required",
        }

    asyncio.run(run())


def test_folders_are_checked_by_the_manager(tmp_path: Path) -> None:
    async def body(dure: Dure, client: Client) -> None:
        await store(client, tmp_path / "bad", BAD)
        await client.folders.create("data", folder_pb2.FOLDER_USAGE_DATA)
        bad, data, none = await asyncio.gather(
            dure("folder", "check", "bad"),
            dure("folder", "check", "data"),
            dure("folder", "check", "projects/default/folders/none"),
        )
        assert bad.code == 1
        assert bad.out.splitlines() == [*PROBLEMS, "5 problems in bad"]
        assert "only model folders have definitions" in data.err
        assert none.code == 3
        found = await client.folders.check("bad", model_definition_path="other.yaml")
        assert found.problems[0].message == "there is no such file in the folder"
        with pytest.raises(errors.InvalidInput, match=r"must not contain empty parts, `.` or `..`"):
            await client.folders.check("bad", model_definition_path="../other.yaml")

    with_program(tmp_path, body)


def test_models_are_listed_and_run(tmp_path: Path) -> None:
    async def body(dure: Dure, client: Client) -> None:
        assert "No models" in (await dure.ok("model", "list")).err
        await store(client, tmp_path / "Good_1", GOOD)
        await store(client, tmp_path / "bad", BAD)
        await store(client, tmp_path / "half", {"model-definition.yaml": DEFINITION})
        await client.folders.create("data", folder_pb2.FOLDER_USAGE_DATA)
        listed, quiet, shown, refused = await asyncio.gather(
            dure.ok("model", "list"),
            dure.ok("model", "list", "-q"),
            dure.ok("model", "get", "Good_1"),
            dure("model", "run", "half"),
        )
        rows = [line.split()[:5] for line in listed.out.splitlines()]
        assert rows[:2] == [
            ["NAME", "TITLE", "TASK", "RUNTIMES", "RUNNABLE"],
            ["Good_1", "Simple", "demo", "sglang,", "custom"],
        ]
        assert "service-definition.toml: there is no such file in the folder" in listed.out.splitlines()[3]
        assert quiet.out == "Good_1\nbad\nhalf\n"
        assert "Runnable:     yes: dure model run Good_1" in shown.out
        assert "Min resource: cpu=1" in shown.out
        assert refused.code == 1
        assert "service-definition.toml: there is no such file in the folder" in refused.err

        made = await dure.ok("model", "run", "Good_1", "-o", "json")
        assert made.json["name"] == "projects/default/endpoints/good-1"
        assert made.json["runtime"] == "sglang", "the first of the file"
        assert made.json["replica_count"] == 1
        again = await dure("model", "run", "Good_1")
        assert again.code == 5
        other = (
            "model",
            "run",
            "Good_1",
            "--name",
            "mine",
            "--runtime",
            "custom",
            "--replicas",
            "2",
            "-o",
            "json",
        )
        resolved: Any = (await dure.ok(*other)).json["resolved"]
        assert resolved["image"] == "example.com/serve:1"
        assert resolved["resource_slots"]["mem"] == str(2**31)
        missing = await dure("model", "run", "Good_1", "--name", "x", "--runtime", "vllm")
        assert "no section for `vllm`; it has `sglang`, `custom`" in missing.err
        with pytest.raises(errors.NotFound, match="it is no model"):
            await client.models.get("data")
        assert [model.runnable async for model in client.models.list()] == [True, False, False]

    with_program(tmp_path, body)


def test_names_of_endpoints_that_models_give() -> None:
    assert endpoint_id_of("SmolLM2-135M.v1") == "smollm2-135m-v1"
    assert endpoint_id_of("7B_model") == "model-7b-model"
    assert endpoint_id_of("a" * 64) == "a" * 63
    assert endpoint_id_of("9" * 64) == "model-" + "9" * 57


def test_runtimes_are_data(tmp_path: Path) -> None:
    async def body(dure: Dure, client: Client) -> None:
        assert (await dure.ok("runtime", "list", "-q")).out.split() == sorted(
            ["vllm", "sglang", "nim", "huggingface-tgi", "llama-cpp", "modular-max", "cmd", "custom"]
        )
        vllm = await dure.ok("runtime", "get", "vllm", "-o", "yaml")
        (tmp_path / "mine.yaml").write_text(vllm.out)
        made = (
            "runtime",
            "create",
            "mine",
            "-f",
            "mine.yaml",
            "--port",
            "8100",
            "-e",
            "MODE=fast",
            "-o",
            "json",
        )
        item = (await dure.ok(*made)).json
        assert (item["name"], item["port"], item["builtin"]) == ("runtimes/mine", 8100, False)
        assert item["gpu_fraction_flag"] == "--gpu-memory-utilization"
        assert (await dure(*made)).code == 5
        changed = await dure.ok("runtime", "update", "mine", "--health-path", "/up", "-o", "json")
        check: Any = changed.json["health_check"]
        assert (check["path"], check["initial_delay_s"]) == ("/up", 1800.0)
        assert changed.json["port"] == 8100
        await store(client, tmp_path / "m", {"weights": ""})
        endpoint = await client.endpoints.create("e", model="m", runtime="mine", replicas=0)
        assert (endpoint.resolved.port, endpoint.resolved.environ["MODE"]) == (8100, "fast")
        await dure.ok("runtime", "delete", "mine")
        assert (await dure("runtime", "get", "mine")).code == 3
        assert (await client.endpoints.get("e")).resolved.port == 8100, "a revision stays as it is"
        with pytest.raises(errors.InvalidInput, match="unknown runtime `mine`"):
            await client.endpoints.update("e", environ={"A": "1"})

        builtin, removed = await asyncio.gather(
            dure("runtime", "update", "vllm", "--port", "1"), dure("runtime", "delete", "vllm")
        )
        assert builtin.code == removed.code == 5
        assert "comes with Dure and cannot be changed" in builtin.err
        (tmp_path / "bad.toml").write_text('prot = 1\nport = 2\n[start_command]\nargz = ["x"]\n')
        bad = await dure("runtime", "create", "bad", "-f", "bad.toml")
        assert bad.code == 1
        assert "bad.toml: prot: unknown key; did you mean `port`?" in bad.err
        assert "bad.toml: start_command.argz: unknown key; did you mean `args`?" in bad.err
        with pytest.raises(errors.InvalidInput) as caught:
            await client.runtimes.create(
                "Bad", catalog_pb2.Runtime(port=2200, start_command=StartCommand(line=" "))
            )
        assert [violation.field for violation in caught.value.violations] == [
            "runtime_id", "runtime.port", "runtime.start_command"
        ]  # fmt: skip

    with_program(tmp_path, body)
