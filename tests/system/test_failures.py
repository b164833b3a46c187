"""Every way in which a model can fail, what is said of it, and the document's own way out."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from system.cluster import Cluster, until

SLOTS = ("-r", "cpu=0.1", "-r", "mem=64m")
# POST /sick and /well switch what its health check answers; /exit and /eat end it.
PROGRAM = """
import http.server, os, sys
well = True
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(200 if well or self.path != "/health" else 500)
    def do_POST(self):
        global well
        if self.path == "/exit":
            print("the disk of the model is gone", flush=True)
            os._exit(7)
        if self.path == "/eat":
            eaten = [bytearray(2**20) for _ in range(400)]
        well = self.path == "/well"
        self.answer(200)
    def answer(self, status):
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
DEFINITION = """
models:
  - name: failing
    model_path: /models
    service:
      start_command: [python, -u, program.py, "{port}"]
      port: 8000
      health_check: {path: /health, interval: 0.2, max_retries: 2, initial_delay: 0, max_wait_time: 2.0}
"""
COMMAND = 'start_command: [python, -u, program.py, "{port}"]'
# Definitions that never come up, and what each replica's error must say.
NEVER = {
    "exits": (
        'start_command: "echo cannot load the weights; exit 3"',
        ["exited with code 3", "cannot load the weights"],
    ),
    "absent": ("start_command: [no-such-server, --port, '{port}']", ["no-such-server"]),
    "mistyped": ('start_command: "pyton serve.py {port}"', ["code 127", "pyton"]),
    "action": (
        COMMAND + "\n      pre_start_actions:\n"
        "        - {action: log, args: {message: first}}\n"
        "        - {action: run_command, args: {command: [sh, -c, 'echo no space left; exit 4']}}",
        ["1", "run_command", "4", "no space left"],
    ),
    "read-only": (
        COMMAND + "\n      pre_start_actions:\n"
        "        - {action: write_file, args: {filename: config.json, body: '{}'}}",
        ["write_file", "/home/work"],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def folders(dure: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    sources = {}
    for name in (*NEVER, "failing"):
        source = sources[name] = tmp_path_factory.mktemp(name)
        text = DEFINITION.replace(COMMAND, NEVER[name][0]) if name in NEVER else DEFINITION
        (source / "model-definition.yaml").write_text(text)
        (source / "program.py").write_text(PROGRAM)
        dure.dure("folder", "create", name, "--usage", "model")
        dure.dure("folder", "upload", name, f"{source}/")
    yield sources
    for name in sources:
        dure.dure("folder", "delete", name)


def post(target: str, path: str) -> None:
    try:
        urllib.request.urlopen(f"http://{target}{path}", data=b"", timeout=10).close()
    except (OSError, urllib.error.URLError):
        return


def events(dure: Cluster, endpoint: str) -> list[dict[str, Any]]:
    return list(json.loads(dure.dure("endpoint", "events", endpoint, "-o", "json"))["events"])


def told(dure: Cluster, endpoint: str, reason: str, *wanted: str) -> str:
    """The message of the first event with this reason that says all that is wanted."""

    def found() -> str:
        said = [e["message"] for e in events(dure, endpoint) if e["reason"] == reason]
        return next((text for text in said if all(word in text for word in wanted)), "")

    return str(until(found, 30, f"{reason}: {wanted}"))


def test_what_never_comes_up_is_blocked_with_every_error_and_mended(
    dure: Cluster, folders: dict[str, Path]
) -> None:
    for name in NEVER:
        dure.dure("endpoint", "create", name, "--model", name, "--replicas", "1", *SLOTS)
    for name, (_, wanted) in NEVER.items():
        errors = until(lambda name=name: dure.get(name)["errors"], 60, f"{name} has failed")
        for text in wanted:
            assert text in errors[0], (name, errors)
    endpoint = until(
        lambda: (found := dure.get("exits"))["status"] == "BLOCKED" and found, 60, "BLOCKED after five"
    )
    assert len(endpoint["errors"]) == 5
    assert all(text in error for text in NEVER["exits"][1] for error in endpoint["errors"])
    assert "dure endpoint retry exits" in endpoint["status_reason"]
    shown = dure.dure("endpoint", "get", "exits")
    assert "BLOCKED" in shown and "Errors in a row" in shown
    dure.dure("endpoint", "wait", "exits", "--timeout", "30", code=1)
    token = dure.dure("token", "create", "exits", "--expires", "1h", "-q").strip()
    request = urllib.request.Request(
        dure.get("exits")["address"], headers={"Authorization": f"Bearer {token}"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    with refused.value as answer:
        assert (answer.code, json.load(answer)["error"]["code"]) == (503, "blocked")

    # A retry with a file that is still wrong says what is wrong with it, and stays where it is.
    definition = folders["exits"] / "model-definition.yaml"
    definition.write_text(DEFINITION.replace("port: 8000", "prot: 8000"))
    dure.dure("folder", "upload", "exits", str(definition))
    assert "did you mean `port`?" in dure.dure("endpoint", "retry", "exits", code=1)
    assert dure.get("exits")["status"] == "BLOCKED"
    # The document's own way out: overwrite the file, `Clear error and Retry`.
    definition.write_text(DEFINITION)
    dure.dure("folder", "upload", "exits", str(definition))
    dure.dure("endpoint", "retry", "exits")
    dure.dure("endpoint", "wait", "exits", "--timeout", "30")
    mended = dure.get("exits")
    assert (mended["status"], mended["revision"], mended["errors"]) == ("HEALTHY", 2, [])
    for name in NEVER:
        dure.dure("endpoint", "delete", name)
    for name in NEVER:
        until(
            lambda name=name: name not in dure.dure("endpoint", "list", "-q").split(), 30, f"{name} is gone"
        )


def test_what_served_and_fails_is_replaced_and_says_why(dure: Cluster) -> None:
    dure.dure(*("endpoint", "create", "f", "--model", "failing", *SLOTS, "--wait", "--timeout", "60"))

    def healthy(but: str) -> dict[str, Any] | None:
        replicas = [r for r in dure.get("f")["replicas"] if r["uid"] != but and r["status"] == "HEALTHY"]
        return replicas[0] if replicas else None

    # Unready: it takes no traffic, says why, and comes back by itself.
    first = until(lambda: healthy(""), 20, "it is healthy")
    post(first["target"], "/sick")
    until(lambda: dure.get("f")["status"] == "UNHEALTHY", 20, "it is unhealthy")
    assert "500" in told(dure, "f", "REPLICA_UNHEALTHY")
    post(first["target"], "/well")
    assert until(lambda: healthy(""), 20, "it is healthy again")["uid"] == first["uid"]
    # An exit counts at once, with its code and the last lines.
    post(first["target"], "/exit")
    told(dure, "f", "REPLICA_FAILED", "exited with code 7", "the disk of the model is gone")
    second = until(lambda: healthy(first["uid"]), 30, "it is replaced")
    assert "the disk of the model is gone" in dure.dure("logs", "f", "--previous")
    # More memory than granted: said in so many words.
    if os.geteuid() == 0:
        post(second["target"], "/eat")
        told(dure, "f", "REPLICA_FAILED", "it used more memory than it was granted (mem)")
        until(lambda: healthy(second["uid"]), 30, "it is replaced")
    dure.dure("endpoint", "delete", "f", "--wait")
