"""The process that talks to the driver: it may hang or die, and is replaced."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from agent_fakes import alive
from gpu.stand_in import GpuNode, needs_cc

pytestmark = needs_cc

# Runs in a process of its own: whether a library is found is decided when a program starts.
PROGRAM = """
import json, os, signal, sys, threading, time
from dure.agent.nvml.client import Client, NoAnswer, library_is_there

state = sys.argv[1]
def write(**told):
    with open(state + ".new", "w") as file:
        json.dump({**known, **told}, file)
    os.replace(state + ".new", state)
with open(state) as file:
    known = json.load(file)

assert library_is_there()
client = Client()
answer = client.ask("devices", 10)
assert [gpu["id"] for gpu in answer["gpus"]] == [gpu["uuid"] for gpu in known["gpus"]], answer
first = client._process.pid

write(hang=["Name"])
began = time.monotonic()
try:
    client.ask("devices", 1)
    raise SystemExit("an answer from a driver that hangs")
except NoAnswer as error:
    assert "within 1 s" in str(error) and time.monotonic() - began < 10, error
assert not os.path.exists(f"/proc/{first}"), "it was not killed"

write()
answers = []
both = [
    threading.Thread(target=lambda kind=kind: answers.append(client.ask(kind, 10)))
    for kind in ("devices", "uses")
]
for one in both:
    one.start()
for one in both:
    one.join()
assert len(answers) == 2
second = client._process.pid
assert second != first

os.kill(second, signal.SIGKILL)
try:
    client.ask("uses", 10)
    raise SystemExit("an answer from a process that died")
except NoAnswer as error:
    assert "died" in str(error), error
assert set(client.ask("uses", 10)) == {
    one["uuid"] for gpu in known["gpus"] for one in gpu.get("parts", [gpu])
}
print(client._process.pid)
"""


def test_a_worker_that_hangs_or_dies_is_replaced_and_ends_with_its_agent(tmp_path: Path) -> None:
    node = GpuNode(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, node.environ["FAKE_NVML"]],
        env={**os.environ, **node.environ},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Its agent ended without a word, and so does it.
    deadline_s = time.monotonic() + 10
    while alive(int(done.stdout)):
        assert time.monotonic() < deadline_s, "the worker outlived its agent"
        time.sleep(0.02)
