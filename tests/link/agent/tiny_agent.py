"""An agent in plain gRPC and nothing of ours but the stubs: what a program in another language would be.

It keeps to a part of the protocol, or, with `--lie`, does not.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import grpc

from dure.fleet.v1 import fleet_pb2, fleet_pb2_grpc

LIES = ("none", "never-complete", "forgets", "exit-codes", "silent")


class Kernel:
    def __init__(self, spec: fleet_pb2.KernelSpec) -> None:
        self.spec = spec
        self.status = fleet_pb2.KernelStatus(
            uid=spec.uid,
            generation=spec.generation,
            phase=fleet_pb2.KERNEL_PHASE_PREPARING,
            host="127.0.0.1",
        )
        self.process: subprocess.Popen[bytes] | None = None


class Agent:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.kernels: dict[str, Kernel] = {}
        self.generations: dict[str, int] = {}
        self.outbox: queue.Queue[fleet_pb2.ConnectRequest] = queue.Queue()
        self.storage = Path()
        self.stub = fleet_pb2_grpc.FleetServiceStub(grpc.insecure_channel(options.manager))

    def run(self) -> None:
        while True:
            try:
                self.stream(self.credential())
            except grpc.RpcError:
                time.sleep(0.3)

    def credential(self) -> str:
        file = Path(self.options.state, "credential")
        if not file.exists():
            metadata = (("authorization", f"Bearer {os.environ['DURE_JOIN_TOKEN']}"),)
            joined = self.stub.Join(
                fleet_pb2.JoinRequest(agent=self.options.name), metadata=metadata, wait_for_ready=True
            )
            file.write_text(joined.credential)
        return file.read_text()

    def stream(self, credential: str) -> None:
        outbox = self.outbox = queue.Queue()
        hello = fleet_pb2.Hello(
            protocol_version=1,
            version="tiny",
            resource_group="default",
            host_id="here",
            boot_id="now",
            backend="tiny",
            architecture=os.uname().machine,
            slots={"cpu": 1000, "mem": 2**30 * 1000},
            limitations=["it can do neither extra mounts, nor shared memory, nor several kernels"],
        )
        outbox.put(fleet_pb2.ConnectRequest(hello=hello))
        known = [] if self.options.lie == "forgets" else [one.status for one in self.kernels.values()]
        complete = self.options.lie != "never-complete"
        outbox.put(fleet_pb2.ConnectRequest(observed=fleet_pb2.Observed(kernels=known, complete=complete)))
        call = self.stub.Connect(
            iter(outbox.get, None), metadata=(("authorization", f"Bearer {credential}"),)
        )
        if self.options.lie != "silent":
            threading.Thread(target=self.beat, args=(call, outbox), daemon=True).start()
        for message in call:
            if message.HasField("welcome"):
                self.storage = Path(message.welcome.storage_path)
            elif message.HasField("desired"):
                for spec in message.desired.kernels:
                    self.want(spec)
                for removal in message.desired.removals:
                    self.remove(removal.uid, removal.generation)

    def beat(self, call: grpc.Call, outbox: queue.Queue[fleet_pb2.ConnectRequest]) -> None:
        sequence = 0
        while call.is_active():
            sequence += 1
            outbox.put(fleet_pb2.ConnectRequest(heartbeat=fleet_pb2.Heartbeat(sequence=sequence)))
            time.sleep(0.5)

    def want(self, spec: fleet_pb2.KernelSpec) -> None:
        if spec.uid in self.kernels:
            return None
        if spec.generation < self.generations.get(spec.uid, 1):
            return self.tell_gone(spec.uid)
        kernel = self.kernels[spec.uid] = Kernel(spec)
        self.generations[spec.uid] = spec.generation
        self.report(kernel)
        return threading.Thread(target=self.serve, args=(kernel,), daemon=True).start()

    def remove(self, uid: str, generation: int) -> None:
        self.generations[uid] = generation
        kernel = self.kernels.pop(uid, None)
        if kernel is not None and kernel.process is not None:
            kernel.process.kill()
            kernel.process.wait()
        self.tell_gone(uid)

    def tell_gone(self, uid: str) -> None:
        gone = fleet_pb2.KernelStatus(
            uid=uid, generation=self.generations[uid], phase=fleet_pb2.KERNEL_PHASE_GONE
        )
        self.outbox.put(fleet_pb2.ConnectRequest(observed=fleet_pb2.Observed(kernels=[gone])))

    def serve(self, kernel: Kernel) -> None:
        spec, status = kernel.spec, kernel.status
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            status.port = probe.getsockname()[1]
        start = spec.command
        command = (
            list(start.argv.args) if start.HasField("argv") else [start.shell.shell, "-c", start.shell.line]
        )
        environ = {**os.environ, **spec.environ, "PORT": str(status.port), "DURE_KERNEL_UID": spec.uid}
        kernel.process = process = subprocess.Popen(
            [argument.replace("{port}", str(status.port)) for argument in command],
            env=environ,
            cwd=self.storage / spec.model.folder_uid,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        status.pid, status.phase = process.pid, fleet_pb2.KERNEL_PHASE_RUNNING
        status.health = fleet_pb2.KERNEL_HEALTH_DEGRADED
        self.report(kernel)
        threading.Thread(target=self.probe, args=(kernel,), daemon=True).start()
        assert process.stdout is not None
        log = process.stdout.read().decode()
        code = process.wait()
        if spec.uid not in self.kernels:
            return
        status.pid, status.phase = 0, fleet_pb2.KERNEL_PHASE_EXITED
        told = 0 if self.options.lie == "exit-codes" else code if code >= 0 else 128 - code
        reason = "EXITED" if code >= 0 else "SIGNALED"
        status.exit.CopyFrom(
            fleet_pb2.KernelExit(reason=reason, code=told, log_tail=log[-4000:], message=f"ended ({code})")
        )
        self.report(kernel)

    def probe(self, kernel: Kernel) -> None:
        assert kernel.process is not None
        while kernel.process.poll() is None:
            try:
                with socket.create_connection(("127.0.0.1", kernel.status.port), 1):
                    kernel.status.health = fleet_pb2.KERNEL_HEALTH_HEALTHY
                    return self.report(kernel)
            except OSError:
                time.sleep(0.05)
        return None

    def report(self, kernel: Kernel) -> None:
        status = fleet_pb2.KernelStatus()
        status.CopyFrom(kernel.status)
        self.outbox.put(fleet_pb2.ConnectRequest(observed=fleet_pb2.Observed(kernels=[status])))

    def end(self, *_: object) -> None:
        for kernel in self.kernels.values():
            if kernel.process is not None:
                kernel.process.kill()
        os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    for option in ("--manager", "--name", "--state"):
        parser.add_argument(option, required=True)
    parser.add_argument("--lie", choices=LIES, default="none")
    agent = Agent(parser.parse_args())
    signal.signal(signal.SIGTERM, agent.end)
    agent.run()


if __name__ == "__main__":
    main()
