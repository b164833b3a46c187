"""The document's own example, as printed there: its definition file, its 60 s, its curl."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import own_ports
import pytest
from system.cluster import Cluster, until

DEFINITION = """\
models:
  - name: "simple-http-server"
    model_path: "/models"
    service:
      start_command:
        - python
        - -m
        - http.server
        - --directory
        - /home/work
        - "8000"
      port: 8000
      health_check:
        path: /
        interval: 10.0
        max_retries: 10
        max_wait_time: 15.0
        expected_status_code: 200
        initial_delay: 60.0
"""


def curl(*args: str) -> tuple[int, str]:
    """The command of the document, with the status that it got at the end."""
    command = ["curl", "-sS", "-m", "20", "-w", "\n%{http_code}", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), body


@pytest.fixture
def its_port() -> Iterator[None]:
    with own_ports.literal(8000):
        yield


@pytest.mark.usefixtures("its_port")
def test_the_example_of_the_document(dure: Cluster) -> None:
    dure.model("example", DEFINITION, "")
    assert "example is right" in dure.dure("folder", "check", "example")
    started = time.monotonic()
    slots = ("-r", "cpu=0.1", "-r", "mem=128m")
    dure.dure("endpoint", "create", "simple-http-server", "--model", "example", *slots)
    state = dure.dure("endpoint", "wait", "simple-http-server", "--timeout", "110", timeout_s=120)
    # The first probe comes one interval after the initial delay: not before 70 s.
    assert 69 < time.monotonic() - started < 100, state
    endpoint = dure.get("simple-http-server")
    assert (endpoint["status"], endpoint["replicas"][0]["target"]) == ("HEALTHY", "127.0.0.1:8000")
    address = endpoint["address"]
    token = dure.dure("token", "create", "simple-http-server", "--expires", "1h", "-q").strip()
    json_type = ("-H", "Content-Type: application/json", "-X", "GET")
    status, body = curl(*json_type, "-H", f"Authorization: BackendAI {token}", address)
    assert (status, "Directory listing" in body) == (200, True)
    assert curl(*json_type, address)[0] == 401

    # The session took the very port that the file names: a second one there has to wait, and hears why.
    dure.dure("endpoint", "scale", "simple-http-server", "2")

    def waits() -> bool:
        replicas = dure.get("simple-http-server")["replicas"]
        return any(
            r["status"] == "PENDING" and "write `{port}` instead of 8000" in r["reason"] for r in replicas
        )

    until(waits, 15, "the second replica is told of the port")
    assert "8000" in dure.dure("endpoint", "explain", "simple-http-server")
    dure.dure("endpoint", "scale", "simple-http-server", "0")
    until(lambda: dure.get("simple-http-server")["status"] == "STOPPED", 20, "it is stopped")
    status, body = curl("-H", f"Authorization: BackendAI {token}", address)
    assert (status, "stopped" in body) == (503, True)
    dure.dure("endpoint", "delete", "simple-http-server", "--wait")
    assert "simple-http-server" not in dure.dure("endpoint", "list")
