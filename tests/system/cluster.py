"""A whole cluster of real processes, started as a user starts it, and a load that counts what fails."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import own_ports
from containers import engines

DURE = [sys.executable, "-P", "-m", "dure.client.cli.main"]
HELLO = """
models:
  - name: hello
    model_path: /models
    service:
      start_command: [python, -u, server.py, "{port}"]
      port: 8000
      health_check: {path: /health, interval: 0.3, initial_delay: 0, max_wait_time: 5.0}
"""
SERVER = """
import http.server, os, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = str(os.getpid()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
"""


@dataclass
class Cluster:
    """A running `dure dev`, and the command line set up for it."""

    data_dir: Path
    process: subprocess.Popen[bytes]
    # What every endpoint needs beside: the image, where sessions are containers.
    always: tuple[str, ...] = ()
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def environ(self) -> dict[str, str]:
        return {**os.environ, "DURE_CONTEXT_FILE": str(self.data_dir / "context.toml"), "NO_COLOR": "1"}

    def dure(self, *args: str, code: int = 0, timeout_s: float = 90) -> str:
        """Runs a command that must end with `code`; returns what it printed (stderr, if it must fail)."""
        done = subprocess.run(
            [*DURE, *args], env=self.environ, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stderr if code else done.stdout

    def told(self, *args: str, code: int = 1) -> str:
        """All that a command prints which ends with `code`: findings go to stdout, errors to stderr."""
        done = subprocess.run([*DURE, *args], env=self.environ, capture_output=True, text=True, timeout=90)
        assert done.returncode == code, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout + done.stderr

    def get(self, endpoint: str) -> dict[str, Any]:
        return dict(json.loads(self.dure("endpoint", "get", endpoint, "-o", "json")))

    def program(self, name: str) -> int:
        return int((self.data_dir / "run" / f"{name}.pid").read_text())

    def start(self, *args: str) -> None:
        """Starts a program by hand, as the one who found it dead would."""
        log = (self.data_dir / f"by-hand-{len(self.started)}.log").open("wb")
        with log:
            command = [*DURE, *args, "--data-dir", str(self.data_dir)]
            self.started.append(subprocess.Popen(command, env=self.environ, stdout=log, stderr=log))

    def kill(self, name: str) -> None:
        os.kill(self.program(name), signal.SIGKILL)

    def model(self, folder: str = "m", definition: str = HELLO, server: str = SERVER) -> None:
        source = self.data_dir / f"source-{folder}"
        source.mkdir()
        (source / "model-definition.yaml").write_text(definition)
        (source / "server.py").write_text(server)
        self.dure("folder", "create", folder, "--usage", "model")
        self.dure("folder", "upload", folder, str(source))

    def serve(self, name: str, replicas: int = 2, *args: str) -> dict[str, Any]:
        """A healthy endpoint of the model in folder `m`."""
        slots = ("-r", "cpu=0.2", "-r", "mem=128m", "-r", "cuda.shares=0.25")
        self.dure(
            *("endpoint", "create", name, "--model", "m", "--replicas", str(replicas), *slots),
            *self.always,
            *args,
            *("--wait", "--timeout", "60"),
        )
        return self.get(name)


@contextlib.contextmanager
def cluster(data_dir: Path, agents: int = 1, backend: str = "process", **variables: str) -> Iterator[Cluster]:
    """Stops it as Ctrl-C does, and checks that nothing of it is left. Agents read variables too."""
    # Ports of endpoints and sessions rest for 10 minutes: enough for all tests that share a cluster.
    with own_ports.row(402) as ports, _cluster(data_dir, agents, backend, ports, variables) as running:
        yield running


@contextlib.contextmanager
def _cluster(
    data_dir: Path, agents: int, backend: str, ports: range, variables: dict[str, str]
) -> Iterator[Cluster]:
    always = ("--image", engines.provide()) if backend == "docker" else ()
    command = [*DURE, "dev", "--data-dir", str(data_dir), "--agents", str(agents)]
    command += ["--manager-port", str(ports[0]), "--proxy-admin-port", str(ports[1])]
    command += ["--proxy-ports", own_ports.option(ports[2:102]), "--backend", backend]
    environ = {
        **os.environ,
        "DURE_CONTEXT_FILE": str(data_dir / "context.toml"),
        "DURE_LEASE_DIR": str(data_dir / "leases"),
        "DURE_SESSION_PORTS": own_ports.option(ports[102:]),
        **variables,
    }
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "dev.log").open("wb") as log:
        process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    running = Cluster(data_dir, process, always)
    try:
        running.dure("doctor", "--wait", "40")
        yield running
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            process.kill()
            for started in running.started:
                started.kill()
                started.wait(10)
    assert process.returncode == 0, (data_dir / "dev.log").read_text()
    assert processes_of(data_dir) == []
    if backend == "docker":
        left = [one for home in (data_dir / "agents").iterdir() for one in engines.left_behind(home)]
        assert left == []


def processes_of(data_dir: Path) -> list[str]:
    """Command lines of processes that name the data folder, or run a session of it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes() + b"\0" + (entry / "environ").read_bytes()
            if str(data_dir).encode() in words and int(entry.name) != os.getpid():
                found.append(f"{entry.name}: {words[:200]!r}")
    return found


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The condition's first true value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what}")


@contextlib.asynccontextmanager
async def load(address: str, token: str = "", workers: int = 4) -> AsyncIterator[collections.Counter[str]]:
    """Requests all the time, GET and POST; counts answers by status and failures by their text."""
    counts: collections.Counter[str] = collections.Counter()
    headers = {"Authorization": f"BackendAI {token}"} if token else {}
    stop = asyncio.Event()

    async def work(session: aiohttp.ClientSession, number: int) -> None:
        while not stop.is_set():
            try:
                method = "GET" if number % 2 else "POST"
                data = None if number % 2 else b"x" * 100
                async with session.request(method, address, data=data) as response:
                    body = await response.read()
                    told = "200" if response.status == 200 else f"{method}: {body.decode()[:200]}"
                    counts[told] += 1
            except aiohttp.ClientError as error:
                counts[f"{method}: {error!r}"[:200]] += 1
            await asyncio.sleep(0.01)

    timeout = aiohttp.ClientTimeout(total=20)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        tasks = [asyncio.create_task(work(session, number)) for number in range(workers)]
        try:
            yield counts
        finally:
            stop.set()
            await asyncio.gather(*tasks)
