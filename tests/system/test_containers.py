"""The main job with containers: a real model behind a permanent, authenticated address, on a real engine."""

from __future__ import annotations

import asyncio
import io
import json
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import engines
from system.cluster import Cluster, cluster, until
from system.test_main_job import answer

from dure.client.demo import chat
from dure.client.demo.model import fetch_model

SOURCE = Path(chat.__file__).parent / "smollm2"


@pytest.fixture(scope="module")
def contained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("contained") / "d", agents=2, backend="docker") as running:
        yield running


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    """The image with llama.cpp's server: one shared object, good for any Python 3."""
    engines.provide()
    with engines.client() as engine:
        made = engine.create_container(engines.IMAGE, ["true"])
        try:
            data = io.BytesIO()
            with tarfile.open(fileobj=data, mode="w") as archive:
                archive.add(Path(sysconfig.get_paths()["purelib"]) / "xllamacpp", "xllamacpp")
            engine.put_archive(made, "/usr/lib/python3/dist-packages", data.getvalue())
            repository, _, last = engines.tag("llama").partition(":")
            engine.commit(made, repository=repository, tag=last)
        finally:
            engine.remove_container(made, force=True)
        yield engines.tag("llama")
        engine.remove_image(engines.tag("llama"), force=True)


def test_a_real_model_in_containers(contained: Cluster, llama: str, tmp_path: Path) -> None:
    folder = tmp_path / "smollm2"
    folder.mkdir()
    definition = (SOURCE / "model-definition.yaml").read_text()
    command = "[python3, serve.py, --host, 0.0.0.0, --model"
    definition = definition.replace("[python, serve.py, --model", command)
    assert command in definition
    (folder / "model-definition.yaml").write_text(definition)
    (folder / "serve.py").write_bytes((SOURCE / "serve.py").read_bytes())
    (folder / "smollm2.gguf").symlink_to(asyncio.run(fetch_model()))
    contained.dure("folder", "create", "smollm2", "--usage", "model")
    contained.dure("folder", "upload", "smollm2", str(folder), "--follow-symlinks")
    contained.dure(
        *("endpoint", "create", "chat", "--model", "smollm2", "--image", llama, "--replicas", "2"),
        *("-r", "cpu=0.7", "-r", "mem=1g", "-r", "cuda.shares=0.5", "--wait", "--timeout", "80"),
    )
    endpoint = contained.get("chat")
    assert endpoint["status"] == "HEALTHY"
    assert {replica["node"] for replica in endpoint["replicas"]} == {"agent-1", "agent-2"}
    token = contained.dure("token", "create", "chat", "--expires", "1h", "-q").strip()
    pieces: list[str] = []
    told = asyncio.run(chat.stream(endpoint["address"], token, pieces.append))
    assert told.pieces > 3
    assert "".join(pieces).strip()
    assert asyncio.run(chat.status_without_token(endpoint["address"])) == 401
    contained.dure("endpoint", "delete", "chat", "--wait", "--timeout", "60")


def test_limits_profile_and_image_of_an_endpoint(contained: Cluster) -> None:
    contained.model("inside", INSIDE, REPORTER)
    options = ("--shm", "32m", "--profile", "strict", "--pull-policy", "never", "--image", engines.provide())
    contained.dure(
        *("endpoint", "create", "inside", "--model", "inside", "--public", *options),
        *("-r", "cpu=0.5", "-r", "mem=100m", "--wait", "--timeout", "60"),
    )
    address = contained.get("inside")["address"]
    code, text = answer(address)
    assert code == 200
    seen = json.loads(text)
    assert seen["memory"] == 100 * 2**20
    assert seen["shm"] == 32 * 2**20
    assert seen["uid"] == 1000
    assert seen["root"] == "read-only"
    assert seen["model"] == "read-only"
    assert seen["capabilities"] == 0
    contained.dure("endpoint", "delete", "inside", "--wait")


def test_a_session_of_several_kernels_finds_itself(contained: Cluster) -> None:
    contained.model("several", SEVERAL, TALKER)
    contained.dure(
        *("endpoint", "create", "several", "--model", "several", "--cluster-size", "3", "--public"),
        *("-r", "cpu=0.2", "-r", "mem=100m", *contained.always, "--wait", "--timeout", "60"),
    )
    address = contained.get("several")["address"]
    until(lambda: answer(address) == (200, "main1 sub1 sub2"), 20, "all kernels have told who they are")
    contained.dure("endpoint", "delete", "several", "--wait")


def test_what_is_wrong_with_an_image_is_said(contained: Cluster) -> None:
    contained.model("plain")
    contained.dure(
        *("endpoint", "create", "bad", "--model", "plain", "--image", "dure-test-nowhere:9"),
        *("--pull-policy", "never"),
    )
    found = until(
        lambda: "is not on this node" in json.dumps(contained.get("bad")), 20, "the reason is shown"
    )
    assert found
    assert "IMAGE_FAILED" in contained.dure("endpoint", "events", "bad") or found
    contained.dure("endpoint", "delete", "bad", "--wait")


INSIDE = """
models:
  - name: inside
    model_path: /models
    service:
      start_command: [python3, -u, server.py, "{port}"]
      port: 8000
      health_check: {path: /, interval: 0.3, initial_delay: 0}
"""
REPORTER = """
import http.server, json, os, sys
def first(*paths):
    for path in paths:
        if os.path.exists(path):
            return int(open(path).read())
def writable(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return "read-only" if error.errno == 30 else str(error)
    return "writable"
shm = os.statvfs("/dev/shm")
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
seen = {
    "memory": first("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max"),
    "shm": shm.f_blocks * shm.f_frsize,
    "uid": os.getuid(),
    "root": writable("/usr/x"),
    "model": writable("/models/x"),
    "capabilities": int(status["CapEff"], 16),
}
open("/home/work/mine", "w").close()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(seen).encode())
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
"""
SEVERAL = INSIDE.replace("name: inside", "name: several")
TALKER = """
import http.server, os, sys, time, urllib.request
me = os.environ["BACKENDAI_CLUSTER_HOST"]
known = {me}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/i-am/"):
            known.add(self.path.split("/")[-1])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(" ".join(sorted(known)).encode())
    def log_message(self, *args):
        pass
if os.environ["BACKENDAI_CLUSTER_ROLE"] != "main":
    while True:
        try:
            main = os.environ["MASTER_ADDR"]
            urllib.request.urlopen(f"http://{main}:8000/i-am/{me}", timeout=5).read()
            time.sleep(600)
        except OSError:
            time.sleep(0.3)
http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
"""
