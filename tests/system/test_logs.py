"""Logs from the session to the terminal."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from system.cluster import DURE, Cluster, until

SERVER = """
import http.server, os, sys, threading, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("last words", flush=True)
            os._exit(7)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *args):
        pass
def tick():
    number = 0
    while True:
        print("tick", number, flush=True)
        number += 1
        time.sleep(0.1)
threading.Thread(target=tick, daemon=True).start()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture(scope="module", autouse=True)
def ticker(dure: Cluster) -> Iterator[None]:
    dure.model("ticker", server=SERVER)
    slots = ("-r", "cpu=0.1", "-r", "mem=64m")
    dure.dure("endpoint", "create", "ticker", "--model", "ticker", *slots, "--wait", "--timeout", "60")
    yield
    dure.dure("endpoint", "delete", "ticker", "--wait")


def ticks(text: str) -> dict[str, list[int]]:
    """Numbers of the lines by whose they are."""
    found: dict[str, list[int]] = {}
    for line in text.splitlines():
        source, _, number = line.rpartition("tick ")
        if number.isdecimal():
            found.setdefault(source, []).append(int(number))
    return found


def test_lines_of_a_replica(dure: Cluster) -> None:
    until(lambda: "tick 15" in dure.dure("logs", "ticker"), 20, "lines are there")
    text = dure.dure("endpoint", "logs", "ticker", "--tail", "3")
    ((source, numbers),) = ticks(text).items()
    assert source == "" and numbers == list(range(numbers[0], numbers[0] + 3))
    replica = dure.get("ticker")["replicas"][0]["uid"]
    for name in (f"ticker/{replica}", f"ticker/{replica.rpartition('-')[2]}"):
        assert "tick 0\n" in dure.dure("logs", name, "--tail", "0", "--kernel", "main1")
    line = json.loads(dure.dure("logs", "ticker", "--tail", "1", "-o", "json").splitlines()[0])
    assert set(line) == {"replica", "kernel", "time", "text"} and line["replica"] == replica
    young = ticks(dure.dure("logs", "ticker", "--since", "1s"))[""]
    assert 3 < len(young) < 15 and young[0] > 0
    assert dure.dure("logs", "ticker", "--tail", "1", "--timestamps").startswith("20")
    assert "has no replica `nope`" in dure.dure("logs", "ticker/nope", code=3)
    assert "no kernel `sub1`; there are main1" in dure.dure("logs", "ticker", "-k", "sub1", code=3)
    assert "leave out --follow" in dure.dure("logs", "ticker", "-f", "--previous", code=2)


def test_following_across_replicas_that_come_and_go(dure: Cluster, tmp_path: Path) -> None:
    (first,) = dure.get("ticker")["replicas"]
    said = tmp_path / "followed"
    with said.open("wb") as out:
        process = subprocess.Popen(
            [*DURE, "logs", "ticker", "-f", "--tail", "1"], env=dure.environ, stdout=out, stderr=out
        )
    try:
        until(lambda: len(ticks(said.read_text())) == 1, 20, "the first replica's lines")
        dure.dure("endpoint", "scale", "ticker", "2", "--wait")
        # From the second replica on each line says whose it is.
        until(lambda: len({s for s in ticks(said.read_text()) if s}) == 2, 20, "the second replica's lines")
        subprocess.run(["curl", "-s", "-o", "/dev/null", f"http://{first['target']}/die"], check=False)
        until(lambda: len({s for s in ticks(said.read_text()) if s}) >= 3, 40, "the replacement's lines")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.wait(10)
    text = said.read_text()
    assert "last words" in text and "Traceback" not in text
    for source, numbers in ticks(text).items():
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), source
    # Who comes later is followed from its first line on.
    assert sum(numbers[0] == 0 for numbers in ticks(text).values()) >= 2
    previous = dure.dure("endpoint", "logs", "ticker", "--previous", "--tail", "0")
    assert "last words" in previous and "tick 0\n" in previous
    assert "last words" in dure.dure("logs", f"ticker/{first['uid']}")
    dure.dure("endpoint", "scale", "ticker", "1", "--wait")
