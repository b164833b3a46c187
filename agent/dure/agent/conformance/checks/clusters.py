"""Sessions of several kernels on one node."""

from __future__ import annotations

import asyncio

from dure.agent.conformance import specs
from dure.agent.conformance.check import check
from dure.agent.conformance.checks.starts import free_port
from dure.agent.conformance.outcome import demand
from dure.agent.conformance.stage import Stage
from dure.fleet.v1 import fleet_pb2

# main1 waits at the rendezvous; sub1 comes and says where it listens; main1 goes there by its name.
_MEET = """
import os, socket
main, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
if os.environ["RANK"] == "0":
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("0.0.0.0", port))
        server.listen()
        connection = server.accept()[0]
        name, where = connection.recv(100).decode().split()
        with socket.create_connection((name, int(where)), 10) as there:
            print("met", there.recv(100).decode())
else:
    with socket.socket() as server:
        server.bind(("0.0.0.0", 0))
        server.listen()
        for attempt in range(100):
            try:
                connection = socket.create_connection((main, port), 10)
                break
            except OSError:
                import time
                time.sleep(0.1)
        own = os.environ["BACKENDAI_CLUSTER_HOST"]
        connection.sendall((own + " " + str(server.getsockname()[1])).encode())
        server.settimeout(20)
        server.accept()[0].sendall(own.encode())
        print("was visited")
"""
_KEYS = fleet_pb2.SshKeyPair(
    private_key="-----BEGIN OPENSSH PRIVATE KEY-----\nconformance\n-----END OPENSSH PRIVATE KEY-----\n",
    public_key="ssh-ed25519 AAAA conformance",
)


@check("10.1")
async def names_resolve(stage: Stage) -> None:
    """The kernels of a session reach each other by name, and main1 by its rendezvous port."""
    kernels = [stage.spec(["python3", "-c", _MEET]) for _ in range(2)]
    ends = await _both_end(stage, kernels)
    for status, expected in zip(ends, ("met sub1", "was visited"), strict=True):
        demand(
            status.exit.code == 0 and expected in status.exit.log_tail,
            f"`{expected}` and exit code 0",
            specs.told(status),
        )


@check("10.2")
async def cluster_variables(stage: Stage) -> None:
    """Each kernel is told its place, and has the session's ssh keys."""
    own = ("SIZE", "HOSTS", "HOST", "ROLE", "IDX", "LOCAL_RANK")
    shown = [*(f"$BACKENDAI_CLUSTER_{name}" for name in own), "$WORLD_SIZE", "$RANK", "$LOCAL_RANK"]
    line = (
        f"echo {' '.join(shown)} $MASTER_ADDR; cd; "
        "stat -c '%a %n' .ssh/id_ed25519 .ssh/id_ed25519.pub .ssh/authorized_keys; "
        "cat .ssh/authorized_keys; head -n 1 .ssh/id_ed25519; exit 0"
    )
    kernels = [stage.spec(line, ssh_keys=_KEYS) for _ in range(2)]
    ends = await _both_end(stage, kernels)
    for rank, (host, role) in enumerate((("main1", "main"), ("sub1", "sub"))):
        lines = ends[rank].exit.log_tail.splitlines()
        place = f"2 main1,sub1 {host} {role} 1 {rank} 2 {rank} {rank} main1"
        demand(lines[:1] == [place], f"the variables of {host}: {place}", lines[:1])
        expected = [
            *("600 .ssh/id_ed25519", "644 .ssh/id_ed25519.pub", "600 .ssh/authorized_keys"),
            *("ssh-ed25519 AAAA conformance", "-----BEGIN OPENSSH PRIVATE KEY-----"),
        ]
        demand(lines[1:] == expected, f"the keys of {host}", lines[1:])


@check("10.3")
async def subs_are_not_probed(stage: Stage) -> None:
    """Only main1 has a health; a sub is RUNNING, and that is all."""
    kernels = [stage.spec(), stage.spec("exec sleep 3600")]
    _make_session(stage, kernels)
    stage.manager.want(*kernels)
    await _begun(stage, kernels)
    await stage.become(kernels[0], fleet_pb2.KERNEL_HEALTH_HEALTHY)
    sub = kernels[1].uid
    running = fleet_pb2.KERNEL_PHASE_RUNNING
    await stage.status(sub, lambda s: s.phase == running, "RUNNING of the sub")
    await asyncio.sleep(0.5)
    seen = {one.health for _, one in stage.manager.history[sub]}
    demand(seen == {fleet_pb2.KERNEL_HEALTH_UNSPECIFIED}, "no health of a sub", seen)


async def _both_end(
    stage: Stage, kernels: list[fleet_pb2.KernelSpec]
) -> tuple[fleet_pb2.KernelStatus, fleet_pb2.KernelStatus]:
    _make_session(stage, kernels)
    stage.manager.want(*kernels)
    await _begun(stage, kernels)
    return await stage.end(kernels[0]), await stage.end(kernels[1])


async def _begun(stage: Stage, kernels: list[fleet_pb2.KernelSpec]) -> None:
    """Waits until both run or ended; what the node cannot do makes the check not applicable."""
    begun = (fleet_pb2.KERNEL_PHASE_RUNNING, fleet_pb2.KERNEL_PHASE_EXITED)
    for spec in kernels:
        status = await stage.status(spec.uid, lambda s: s.phase in begun, "RUNNING")
        stage.not_if_limited(status, "several kernels")


def _make_session(stage: Stage, kernels: list[fleet_pb2.KernelSpec]) -> None:
    specs.session(kernels, stage.hello.advertise_address or "127.0.0.1", free_port())


CHECKS = (names_resolve, cluster_variables, subs_are_not_probed)
