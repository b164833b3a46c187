"""A swarm of two engines of a test's own, each in a network namespace, with a wire between them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from containers import engines
from containers.engines import OwnEngine

MANAGER, WORKER = "10.198.7.1", "10.198.7.2"


@contextlib.contextmanager
def two() -> Iterator[tuple[OwnEngine, OwnEngine]]:
    """The manager and the worker; the small image is on both. Skips the test where the machine's kernel
    cannot do the networks of swarms."""
    _insist_on_vxlan()
    with (
        # Paths of sockets are short.
        tempfile.TemporaryDirectory(prefix="dure-swarm-", ignore_cleanup_errors=True) as folder,
        engines.own(Path(folder) / "1", live_restore=False, networks=True) as manager,
        engines.own(Path(folder) / "2", live_restore=False, networks=True) as worker,
    ):
        one, other = str(manager.pid), str(worker.pid)
        _run(f"ip link add wire netns {one} type veth peer name wire netns {other}".split())
        for engine, address in ((manager, MANAGER), (worker, WORKER)):
            inside(engine, ["ip", "link", "set", "lo", "up"])
            inside(engine, ["ip", "address", "add", f"{address}/24", "dev", "wire"])
            inside(engine, ["ip", "link", "set", "wire", "up"])
        with engines.client(manager.url) as client:
            client.init_swarm(advertise_addr=MANAGER, listen_addr=f"{MANAGER}:2377")
            token = client.inspect_swarm()["JoinTokens"]["Worker"]
        with engines.client(worker.url) as client:
            client.join_swarm([f"{MANAGER}:2377"], token, advertise_addr=WORKER, listen_addr=f"{WORKER}:2377")
        yield manager, worker


def inside(engine: OwnEngine, command: Sequence[str]) -> str:
    """What a command says in the network of an engine."""
    return _run(["nsenter", "--net", "--target", str(engine.pid), *command])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def _insist_on_vxlan() -> None:
    line = "unshare --net ip link add probe type vxlan id 1 dstport 4789"
    done = subprocess.run(line.split(), capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        why = f"this machine has no VXLAN, of which swarms make their networks: {done.stderr.strip()}"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        pytest.skip(why)
