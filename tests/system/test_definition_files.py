"""Dozens of definition files, wrong and right, through the manager: every error at once, nothing started."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from system.cluster import Cluster

from dure.client import Client
from dure.client.local_check import check_directory
from dure.v1.folder_pb2 import CheckFolderResponse

GOOD = """\
models:
- name: m
  model_path: /models
  service:
    start_command: [serve, "{port}"]
    port: 8000
    health_check: {path: /health}
"""
TOML = """\
[custom.environment]
image = "example.com/server:1"
architecture = "x86_64"
[custom.resource_slots]
cpu = 1
mem = "8gb"
"cuda.shares" = "0.5"
[custom.environ]
MODE = "a"
"""


def edit(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


def yaml(old: str, new: str) -> str:
    return edit(GOOD, old, new)


def toml(old: str, new: str) -> str:
    return edit(TOML, old, new)


ACTIONS = "    port: 8000\n    pre_start_actions:\n"


def action(line: str) -> str:
    return yaml("    port: 8000\n", f"{ACTIONS}    - {line}\n")


# What the file says, and what must be said of it.
WRONG_MODELS = {
    "empty": ("", ["the file is empty"]),
    "comments": ("# soon\n", ["the file has no content"]),
    "tabs": ("models:\n\t- name: m\n", [":2: not YAML: found a tab"]),
    "open": ("models: [", [":1: not YAML"]),
    "binary": ("models: \x07", ["U+0007"]),
    "two-documents": (GOOD + "---\n" + GOOD, [":8: not YAML: a second document"]),
    "no-quotes": (yaml("name: m", "name: m: x"), [":2: not YAML", "put the text in quotes"]),
    "alias": ("models: *m\n", ["undefined alias 'm'"]),
    "list": ("- name: m\n", ["found a list, expected a mapping with the key `models`"]),
    "model": (yaml("models:", "model:"), ["unknown key; did you mean `models`?", "models: is required"]),
    "no-models": ("models: []\n", ["models: is empty"]),
    "one-model": ("models: {name: m}\n", ["begin each with `- `"]),
    "no-name": (yaml("- name: m\n ", "-"), ["models[0].name: is required"]),
    "number-name": (yaml("name: m", "name: 7"), [":2: models[0].name: found the number `7`"]),
    "no-path": (yaml("  model_path: /models\n", ""), ["models[0].model_path: is required"]),
    "relative": (yaml("/models", "models"), [":3: models[0].model_path: `models` is not an absolute path"]),
    "parent": (yaml("/models", "/models/../etc"), ["without `..`"]),
    "no-service": ("models:\n- {name: m, model_path: /m}\n", ["no model has a `service`"]),
    "two-services": (GOOD + GOOD.removeprefix("models:\n"), ["more than one model has a `service`"]),
    "no-command": (
        yaml('start_command: [serve, "{port}"]', "shell: /bin/sh"),
        ["start_command: is required"],
    ),
    "empty-command": (yaml('[serve, "{port}"]', "[]"), ["the first item is the program"]),
    "map-command": (yaml('[serve, "{port}"]', "{run: x}"), ["expected text or a list of texts"]),
    "brace": (yaml('"{port}"', "{port}"), ["a brace begins one: put it in quotes"]),
    "no-port": (yaml("    port: 8000\n", ""), ["models[0].service.port: is required"]),
    "text-port": (yaml("port: 8000", "port: '8000'"), [":6: models[0].service.port", "without quotes"]),
    "high-port": (yaml("port: 8000", "port: 80000"), ["`80000`, expected a whole number from 1 to 65535"]),
    "reserved-port": (yaml("port: 8000", "port: 7681"), ["7681 is reserved"]),
    "twice": (yaml("port: 8000", "port: 8000\n    port: 80"), [":7:", "stands here twice", "on line 6"]),
    "shell": (yaml("port: 8000", "port: 8000\n    shell: zsh"), ["expected the absolute path of a shell"]),
    "unknown": (yaml("health_check:", "healthcheck:"), ["did you mean `health_check`?"]),
    "misplaced": (yaml("  model_path", "  port: 1\n  model_path"), ["`port` belongs in `models[0].service`"]),
    "no-health-path": (yaml("{path: /health}", "{interval: 1}"), ["health_check.path: is required"]),
    "health-path": (yaml("/health}", "health}"), ["must begin with `/`"]),
    "interval": (yaml("/health}", "/health, interval: 0}"), ["interval", "more than 0"]),
    "unit": (yaml("/health}", "/health, max_wait_time: 10s}"), ["max_wait_time: found the text `10s`"]),
    "negative": (yaml("/health}", "/health, initial_delay: -1}"), ["initial_delay", "0 or more"]),
    "retries": (yaml("/health}", "/health, max_retries: 1.5}"), ["max_retries", "a whole number"]),
    "status": (yaml("/health}", "/health, expected_status_code: 999}"), ["from 100 to 599"]),
    "mkdri": (action("{action: mkdri, args: {path: a}}"), ["unknown action `mkdri`; did you mean `mkdir`?"]),
    "no-args": (action("{action: log}"), ["pre_start_actions[0].args: is required"]),
    "no-message": (action("{action: log, args: {debug: true}}"), ["args.message: is required"]),
    "line": (action("{action: run_command, args: {command: ls -l}}"), ["expected a list of texts"]),
    "mode": (action("{action: write_file, args: {filename: a, body: b, mode: rw}}"), ["three octal digits"]),
    "bad-ref": (action("{action: mkdir, ref: port, args: {path: a}}"), ["has a meaning of its own"]),
    "early-ref": (
        action(
            "{action: log, args: {message: '{r.out}'}}\n"
            "    - {action: run_command, ref: r, args: {command: [a]}}"
        ),
        ["`{r}` is the result of models[0].service.pre_start_actions[1], which runs later"],
    ),
    "titel": (GOOD + "  metadata: {titel: x}\n", ["did you mean `title`?"]),
    "many": (
        yaml("port: 8000", "prot: 8000").replace("model_path", "modelpath").replace("path: /h", "path: h"),
        ["did you mean `port`?", "did you mean `model_path`?", "begin with `/`"],
    ),
}
WRONG_SERVICES = {
    "toml-empty": ("", ["the file is empty"]),
    "toml-open": ("[custom", ["not TOML"]),
    "toml-runtime": (TOML.replace("custom", "vlm"), ["unknown runtime `vlm`; did you mean `vllm`?"]),
    "toml-no-runtime": ("[environment]\nimage = 'i'\n", ["a section begins with its runtime"]),
    "toml-no-image": (toml('image = "example.com/server:1"\n', ""), ["environment.image: is required"]),
    "toml-no-arch": (toml('architecture = "x86_64"\n', ""), ["architecture: is required"]),
    "toml-amd64": (toml("x86_64", "amd64"), ["did you mean `x86_64`?"]),
    "toml-no-environment": ("[custom.environ]\nA = '1'\n", ["custom.environment: is required"]),
    "toml-unit": (toml("8gb", "8zb"), [":6: custom.resource_slots.mem", "unknown unit `zb`"]),
    "toml-dot": (toml('"cuda.shares"', "cuda.shares"), ["put the key in quotes"]),
    "toml-hundredth": (toml('"0.5"', '"0.333"'), ["the nearest are 0.33 and 0.34"]),
    "toml-slot": (toml("cpu = 1", "gpu = 1"), ["unknown slot"]),
    "toml-both": (toml("cpu = 1", '"cuda.device" = 1'), ["exclude each other"]),
    "toml-number": (toml('MODE = "a"', "MODE = 8"), ['put it in quotes, "8"']),
    "toml-own": (toml("MODE", "DURE_MODE"), ["is set by Dure itself"]),
    "toml-section": (toml("[custom.environ]", "[custom.environmnt]"), ["did you mean `environment`?"]),
}
RIGHT_MODELS = {
    "as-it-is": GOOD,
    "text": yaml('[serve, "{port}"]', '"cat /etc/hostname | tee $HOME/x && exec serve --port {port}"'),
    "block": yaml('[serve, "{port}"]', "|\n      export A=1\n      exec serve --port $PORT\n"),
    "folded": yaml('[serve, "{port}"]', ">-\n      serve\n      --port {port}"),
    "json-in-it": yaml('[serve, "{port}"]', "[serve, '{\"rope\": {\"a\": 1}}', '${HOME}']"),
    "no-health": yaml("    health_check: {path: /health}\n", ""),
    "windows": GOOD.replace("\n", "\r\n"),
    "korean": yaml("name: m", "name: 모델"),
    "json": json.dumps(
        {"models": [{"name": "m", "model_path": "/m", "service": {"start_command": ["x"], "port": 80}}]}
    ),
    "draft-beside": GOOD + "- {name: draft, model_path: /draft}\n",
    "merge": "models:\n- &a {name: d, model_path: /m}\n- {<<: *a, service: {start_command: x, port: 80}}\n",
    "action": action("{action: run_command, ref: r, args: {command: [nproc], check: false}}"),
    "metadata": GOOD + "  metadata: {title: T, version: 1.0, framework: [a], min_resource: {mem: 8g}}\n",
}


@pytest.fixture(scope="module")
def files(dure: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with every model definition, uploaded as the folder `files`."""
    directory = tmp_path_factory.mktemp("definitions")
    for name, (text, _) in WRONG_MODELS.items():
        (directory / f"{name}.yaml").write_text(text)
    for name, text in RIGHT_MODELS.items():
        (directory / f"{name}.yml").write_bytes(text.encode())
    dure.dure("folder", "create", "files", "--usage", "model")
    dure.dure("folder", "upload", "files", f"{directory}/")
    return directory


def test_every_wrong_model_definition(dure: Cluster, files: Path) -> None:
    async def run() -> None:
        async with Client.from_context(dure.data_dir / "context.toml") as client:
            for name, (_, wanted) in WRONG_MODELS.items():
                found = await client.folders.check("files", model_definition_path=f"{name}.yaml")
                assert {problem.file for problem in found.problems} == {f"{name}.yaml"}
                for text in wanted:
                    assert text in lines(found), (name, lines(found))
                assert lines(check_directory(files, f"{name}.yaml")) == lines(found), name

    asyncio.run(run())


def test_every_right_model_definition(dure: Cluster, files: Path) -> None:
    async def run() -> None:
        async with Client.from_context(dure.data_dir / "context.toml") as client:
            for name in RIGHT_MODELS:
                found = await client.folders.check("files", model_definition_path=f"{name}.yml")
                assert lines(found) == "" and list(found.files) == [f"{name}.yml"]

    asyncio.run(run())


def test_every_wrong_service_definition(dure: Cluster, tmp_path: Path) -> None:
    (tmp_path / "model-definition.yaml").write_text(GOOD)
    dure.dure("folder", "create", "services", "--usage", "model")

    async def run() -> None:
        async with Client.from_context(dure.data_dir / "context.toml") as client:
            for name, (text, wanted) in WRONG_SERVICES.items():
                (tmp_path / "service-definition.toml").write_text(text)
                await client.folders.upload("services", tmp_path)
                found = await client.folders.check("services")
                for words in wanted:
                    assert words in lines(found), (name, lines(found))
                assert lines(check_directory(tmp_path)) == lines(found), name
            (tmp_path / "service-definition.toml").write_text(TOML)
            await client.folders.upload("services", tmp_path)
            assert lines(await client.folders.check("services")) == ""

    asyncio.run(run())


def test_the_command_prints_them_all(dure: Cluster, files: Path) -> None:
    for target in ("files", f"{files}/"):
        told = dure.told("folder", "check", target, "--definition", "many.yaml")
        for wanted in WRONG_MODELS["many"][1]:
            assert wanted in told
        assert len(told.splitlines()) > 3
        right = dure.dure("folder", "check", target, "--definition", "korean.yml")
        assert "is right: korean.yml" in right


def test_nothing_is_made_of_wrong_files_and_all_is_said_at_once(dure: Cluster, files: Path) -> None:
    (files / "service-definition.toml").write_text(toml("8gb", "8zb"))
    dure.dure("folder", "upload", "files", f"{files}/service-definition.toml")
    before = dure.dure("endpoint", "list", "-q")
    refused = dure.dure(
        *("endpoint", "create", "Not-A-Name", "--model", "files", "--definition", "many.yaml"),
        *("-r", "cuda.shares=0.333", "-e", "DURE_X=1", "--preset", "nowhere", "--mount", "files"),
        code=1,
    )
    for wanted in (
        *WRONG_MODELS["many"][1],
        "unknown unit `zb`",
        "`Not-A-Name` is not a name",
        "0.33 and 0.34",
        "DURE_X",
        "nowhere",
        "only data and general folders",
    ):
        assert wanted in refused, wanted
    assert dure.dure("endpoint", "list", "-q") == before
    missing = dure.dure("endpoint", "create", "x", "--model", "files", "--definition", "gone.yaml", code=1)
    assert "gone.yaml" in missing
    missing = dure.dure("endpoint", "create", "x", "--model", "files", code=1)
    assert "model-definition.yaml" in missing and "model-definition.yml" in missing


def lines(found: CheckFolderResponse) -> str:
    return "\n".join(f"{p.file}:{p.line}: {p.key}: {p.message}".replace(" : ", " ") for p in found.problems)
