"""Kernels as the checks ask for them, and the program that most of them run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dure.fleet.v1 import fleet_pb2

MODEL_TARGET = "/models"
PORT = 8000
MEMORY_BYTES = 512 * 2**20
# Serves HTTP, says what it sees, and does what a request asks: a kernel that is controlled from outside needs
# nothing of its node but the port. It does with Python 3.6, and holds no `{name}` that could be a template.
SERVER = """
import http.server, json, os, signal, socketserver, sys, threading, time, uuid
born, since, probes = str(uuid.uuid4()), time.monotonic(), []
answer = [int(os.environ.get("ANSWER", "200"))]
if os.environ.get("DEAF"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
def burn(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        word, _, rest = self.path[1:].partition("/")
        code = 200
        if word == "health":
            probes.append(time.monotonic() - since)
            code = answer[0]
        elif word == "answer":
            answer[0] = int(rest)
        elif word == "say":
            print(rest, flush=True)
        elif word == "burn":
            threading.Thread(target=burn, args=(float(rest),), daemon=True).start()
        elif word == "exit":
            threading.Timer(0.2, os._exit, [int(rest)]).start()
        elif word == "signal":
            threading.Timer(0.2, os.kill, [os.getpid(), int(rest)]).start()
        seen = dict(born=born, cwd=os.getcwd(), argv=sys.argv[1:], environ=dict(os.environ), probes=probes)
        body = json.dumps(seen).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *ignored):
        pass
class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 64
print("serving", flush=True)
time.sleep(float(os.environ.get("WAIT_S", "0")))
Server(("0.0.0.0", int(os.environ["PORT"])), Handler).serve_forever()
"""
SERVE = ("python3", "-c", SERVER)


def kernel(
    uid: str,
    session_uid: str,
    folder_uid: str,
    image: str,
    command: Sequence[str] | str = SERVE,
    **fields: Any,
) -> fleet_pb2.KernelSpec:
    """A kernel that is healthy as soon as its port accepts; text is a line for /bin/sh. `fields` are those
    of the message, in place of what stands here."""
    spec = fleet_pb2.KernelSpec(
        uid=uid,
        session_uid=session_uid,
        generation=1,
        replica_uid=session_uid,
        endpoint="conformance",
        project="conformance",
        command=fleet_pb2.Command(model_path=MODEL_TARGET),
        cluster=fleet_pb2.Cluster(role="main", index=1, size=1, hosts=["main1"]),
        model=fleet_pb2.Mount(folder_uid=folder_uid, folder="model", target=MODEL_TARGET),
        port=PORT,
        stop_grace_ms=2_000,
        model_name="conformance",
        image=image,
        runtime="custom",
        session_name="conformance-1",
    )
    if isinstance(command, str):
        spec.command.shell.CopyFrom(fleet_pb2.Shell(shell="/bin/sh", line=command))
    else:
        spec.command.argv.CopyFrom(fleet_pb2.Argv(args=command))
    fields = {"slots": {"cpu": 1000, "mem": MEMORY_BYTES * 1000}, **fields}
    for name in fields:
        spec.ClearField(name)  # type: ignore[arg-type]
    spec.MergeFrom(fleet_pb2.KernelSpec(**fields))
    return spec


def health_check(**fields: Any) -> fleet_pb2.HealthCheck:
    """Probes /health five times a second."""
    given = {
        "path": "/health",
        "interval_ms": 200,
        "max_retries": 2,
        "max_wait_time_ms": 2_000,
        "expected_status_code": 200,
        **fields,
    }
    return fleet_pb2.HealthCheck(**given)


def session(kernels: Sequence[fleet_pb2.KernelSpec], address: str, rendezvous_port: int) -> None:
    """Makes one session of kernels, all on one node: main1, sub1, ..."""
    hosts = ["main1", *(f"sub{index}" for index in range(1, len(kernels)))]
    for rank, (spec, host) in enumerate(zip(kernels, hosts, strict=True)):
        spec.session_uid = spec.replica_uid = kernels[0].session_uid
        place = fleet_pb2.Cluster(
            role=host.rstrip("123456789"),
            index=int(host[-1]),
            size=len(hosts),
            hosts=hosts,
            addresses=[address] * len(hosts),
            rendezvous_port=rendezvous_port,
            local_rank=rank,
            one_node=True,
        )
        spec.cluster.CopyFrom(place)


def phase_name(phase: fleet_pb2.KernelPhase.ValueType) -> str:
    """A phase as people say it."""
    return fleet_pb2.KernelPhase.Name(phase).removeprefix("KERNEL_PHASE_")


def health_name(health: fleet_pb2.KernelHealth.ValueType) -> str:
    return fleet_pb2.KernelHealth.Name(health).removeprefix("KERNEL_HEALTH_")


def standing(status: fleet_pb2.KernelStatus | None) -> str:
    """What of a kernel must not change by itself, to be compared and shown."""
    if status is None:
        return "no report of the kernel"
    states = f"{phase_name(status.phase)}, {health_name(status.health)}"
    return f"{states}, pid {status.pid}, port {status.port}"


def told(status: fleet_pb2.KernelStatus | None) -> str:
    """A status in one line, for people."""
    if status is None:
        return "no report of the kernel"
    text = phase_name(status.phase)
    if status.health:
        text += f", {health_name(status.health)}"
    if status.HasField("exit"):
        end = status.exit
        text += f", {end.reason} with code {end.code}: {end.message}"
        if end.log_tail:
            text += f" (log: {end.log_tail.strip()[-300:]})"
    elif status.message or status.probe_detail:
        text += f" ({status.message or status.probe_detail})"
    return text
