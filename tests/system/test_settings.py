"""Every setting of an endpoint, seen from inside of its session; and the runtimes that come with Dure."""

from __future__ import annotations

import json
import os
import platform
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from system.cluster import Cluster

root = pytest.mark.root
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="private mounts need root")
# Answers with what a session sees of its settings.
FACTS = """
import glob, http.server, json, os, sys
def tried(path):
    try:
        with open(path, "w") as file:
            file.write("x")
        return "written"
    except OSError as error:
        return type(error).__name__
facts = {
    "argv": sys.argv[1:],
    "cwd": os.getcwd(),
    "environ": dict(os.environ),
    "shm": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
    "words": sorted(glob.glob("/home/work/words/**", recursive=True)),
    "read_only": tried("/home/work/words/new"),
    "writable": tried("/data/new"),
    "model": tried("new"),
    "home": tried(os.path.expanduser("~/new")),
}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(facts).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""
# A pipe, a variable of the shell, awk's braces: all of it is the shell's.
DEFINITION = """
models:
  - name: facts
    model_path: {model_path}
    service:
      start_command: >-
        export SAID=$(echo "one two" | awk '{print $2}');
        exec python facts.py {model_path} {unknown}
      port: 8000
      health_check: {path: /, interval: 0.3, initial_delay: 0}
"""
# What `vllm serve` is to the runtime: a program of that name on PATH.
VLLM = """#!/bin/sh
exec python /models/facts.py "$@"
"""
SLOTS = ("-r", "cpu=0.1", "-r", "mem=64m")
WAIT = ("--wait", "--timeout", "60")


@pytest.fixture(scope="module", autouse=True)
def folders(dure: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    model = tmp_path_factory.mktemp("facts")
    (model / "facts.py").write_text(FACTS)
    (model / "model-definition.yml").write_text(DEFINITION.replace("{model_path}\n", "/models\n", 1))
    (model / "other").mkdir()
    (model / "other" / "path.yaml").write_text(DEFINITION.replace("{model_path}\n", "/weights\n", 1))
    (model / "bin").mkdir()
    (model / "bin" / "vllm").write_text(VLLM)
    (model / "bin" / "vllm").chmod(0o755)
    words = tmp_path_factory.mktemp("words")
    (words / "deep").mkdir()
    (words / "deep" / "word").write_text("word")
    for name, usage, source in (("facts", "model", model), ("words", "data", words)):
        dure.dure("folder", "create", name, "--usage", usage)
        dure.dure("folder", "upload", name, f"{source}/")
    yield
    for name in ("facts", "words"):
        dure.dure("folder", "delete", name)


def facts(dure: Cluster, endpoint: str) -> dict[str, Any]:
    with urllib.request.urlopen(dure.get(endpoint)["address"], timeout=10) as response:
        return dict(json.load(response))


@root
@needs_root
def test_an_endpoint_with_every_setting(dure: Cluster, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("FROM_FILE=1\nBOTH=file\n")
    dure.dure("preset", "create", "tiny", "-r", "cpu=0.2", "-r", "mem=80m", "--shm", "8m")
    architecture = platform.machine()
    dure.dure("image", "create", "server", "example.com/server:1", "--architecture", architecture)
    dure.dure(
        *(
            "endpoint",
            "create",
            "all",
            "--model",
            "facts",
            "--public",
            "--replicas",
            "1",
            "--group",
            "default",
        ),
        *("--preset", "tiny", "-r", "cpu=0.1", "--shm", "16m", "--image", "server"),
        *("--architecture", architecture, "--mount", "words", "--mount", "words/deep:/data:rw"),
        *("--mount-destination", "/weights", "--definition", "other/path.yaml", "--priority", "20"),
        *("--env-file", str(tmp_path / "env"), "-e", "BOTH=option", "-e", "KOREAN=두레"),
        *WAIT,
    )
    seen = facts(dure, "all")
    environ = seen["environ"]
    assert seen["cwd"] == "/weights" and seen["argv"] == ["/weights", "{unknown}"]
    assert environ["SAID"] == "two"
    assert (environ["FROM_FILE"], environ["BOTH"], environ["KOREAN"]) == ("1", "option", "두레")
    assert seen["shm"] == 16 * 2**20
    assert "/home/work/words/deep/word" in seen["words"]
    assert (seen["read_only"], seen["model"]) == ("OSError", "OSError")
    assert (seen["writable"], seen["home"]) == ("written", "written")
    assert "new" in dure.dure("folder", "ls", "words", "deep")
    # The environment of images that were made for Backend.AI.
    endpoint = dure.get("all")
    (replica,) = endpoint["replicas"]
    assert environ["BACKENDAI_SESSION_ID"] == replica["session"]
    assert (environ["BACKENDAI_CLUSTER_SIZE"], environ["BACKENDAI_CLUSTER_HOST"]) == ("1", "main1")
    assert environ["BACKENDAI_KERNEL_IMAGE"] == "example.com/server:1"
    assert (environ["BACKEND_MODEL_NAME"], environ["BACKEND_MODEL_PATH"]) == ("facts", "/weights")
    assert environ["HOME"] == "/home/work"
    # Slots: request over preset.
    resolved = endpoint["resolved"]
    assert resolved["image"] == "example.com/server:1"
    assert resolved["resource_slots"]["cpu"] == "0.1"
    assert int(resolved["resource_slots"]["mem"]) == 80 * 2**20
    dure.dure("endpoint", "delete", "all", "--wait")
    dure.dure("preset", "delete", "tiny")
    dure.dure("image", "delete", "server")


def test_mounts_that_cannot_be(dure: Cluster) -> None:
    for mounts, wanted in (
        (("facts",), "only data and general folders"),
        (("nowhere",), "nowhere"),
        (("words/none",), "no sub-folder `none`"),
        (("words/../..",), ".."),
        (("words:/etc",), "would cover a folder of the system"),
        (("words:/models/x",), "/models"),
        (("words:/a", "words:/a"), "/a"),
    ):
        options = [word for mount in mounts for word in ("--mount", mount)]
        told = dure.dure("endpoint", "create", "x", "--model", "facts", *SLOTS, *options, code=1)
        assert wanted in told, (mounts, told)


def test_groups_spread_pack_and_choose_their_projects(dure: Cluster) -> None:
    slots = (*SLOTS, "--public", "--replicas", "2", *WAIT)
    dure.dure("endpoint", "create", "apart", "--model", "facts", *slots)
    assert {replica["node"] for replica in dure.get("apart")["replicas"]} == {"agent-1", "agent-2"}
    dure.dure("endpoint", "delete", "apart", "--wait")
    dure.dure("group", "update", "default", "--policy", "pack")
    try:
        dure.dure("endpoint", "create", "close", "--model", "facts", *slots)
        assert len({replica["node"] for replica in dure.get("close")["replicas"]}) == 1
        dure.dure("endpoint", "delete", "close", "--wait")
    finally:
        dure.dure("group", "update", "default", "--policy", "spread")

    dure.dure("project", "create", "others")
    dure.dure("group", "create", "theirs", "--allow", "others")
    told = dure.dure("endpoint", "create", "x", "--model", "facts", *SLOTS, "--group", "theirs", code=1)
    assert "theirs" in told and "resource group" in told
    dure.dure("group", "delete", "theirs")
    dure.dure("project", "delete", "others")


@root
@needs_root
def test_vllm_with_its_flags_and_overrides(dure: Cluster) -> None:
    """The runtime's own command, run by a program of that name, with the flags that variables turn into."""
    path = "/models/bin:" + os.environ["PATH"]
    dure.dure(
        *("endpoint", "create", "vllm", "--model", "facts", "--runtime", "vllm", *SLOTS),
        *("-r", "cuda.shares=0.25", "-e", f"PATH={path}", "-e", "VLLM_TP_SIZE=2", "-e", "VLLM_PP_SIZE=1"),
        *(
            "-e",
            "VLLM_QUANTIZATION=awq",
            "-e",
            "VLLM_EXTRA_ARGS=--max-model-len 4096 --served-model-name 'a b'",
        ),
        *("--public", "--health-path", "/", "--health-interval", "300ms", *WAIT),
    )
    seen = facts(dure, "vllm")
    port = seen["environ"]["PORT"]
    assert seen["argv"][:6] == ["serve", "/models", "--host", "0.0.0.0", "--port", port]
    flags = " ".join(seen["argv"][6:])
    for flag in (
        "--tensor-parallel-size 2",
        "--pipeline-parallel-size 1",
        "--quantization awq",
        "--max-model-len 4096 --served-model-name a b",
        "--gpu-memory-utilization 0.25",
    ):
        assert flag in flags, flags
    assert seen["environ"]["GPU_COUNT"] == "1"
    # A command of the request is run as it is.
    dure.dure("endpoint", "update", "vllm", "--wait", "--", "python", "facts.py", "{port}", "a  b")
    assert facts(dure, "vllm")["argv"][1:] == ["a  b"]
    dure.dure("endpoint", "delete", "vllm", "--wait")


def test_runtimes_that_lack_something_say_what(dure: Cluster) -> None:
    for runtime, wanted in (
        ("llama-cpp", "gguf"),
        ("nim", "image"),
        ("cmd", "image"),
        ("vlm", "did you mean `vllm`"),
    ):
        told = dure.dure("endpoint", "create", "x", "--model", "facts", "--runtime", runtime, *SLOTS, code=1)
        assert wanted in told, (runtime, told)


def test_a_program_that_is_not_there(dure: Cluster, tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_text("no weights")
    dure.dure("folder", "create", "gguf", "--usage", "model")
    dure.dure("folder", "upload", "gguf", f"{tmp_path}/")
    told = dure.told(
        *("endpoint", "validate", "--model", "gguf", "--runtime", "llama-cpp", *SLOTS, "-e", "PATH=/bin"),
    )
    assert "llama-server" in told
    dure.dure("folder", "delete", "gguf")
