"""What an engine is asked to make for a kernel: a function of the plan, the image and the node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dure.agent.backends.base import HOME, Bind, Container, Plan

PIDS_MAX = 4096
LOG_FILE_SIZE, LOG_FILES = "8m", "2"
CPU_PERIOD_US = 100_000
# The engine refuses less than this.
MEMORY_BYTES_MIN = 6 * 1024 * 1024
# Not root in any image; only the strict profile insists.
STRICT_USER = "1000:1000"
# Of what engines leave to containers: device nodes, raw packets (forging those of neighbours), capabilities
# on files, the kernel's audit log.
DROPPED = ("MKNOD", "NET_RAW", "SETFCAP", "AUDIT_WRITE")
GATE = "/run/dure"
# Open files: a model server has one for each connection. Locked memory: GPUs copy from it. Processes are
# bounded by PIDS_MAX; podman sets their limit unasked, to more than an agent without all rights may have.
ULIMITS = {"nofile": 1024 * 1024, "memlock": -1, "nproc": 4194304}
NVIDIA, CDI, ENVIRONMENT = "nvidia", "cdi", "environment"


@dataclass(frozen=True)
class Image:
    """An image that is on this node."""

    id: str
    architecture: str
    user: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Node:
    """What a container gets of its node: at which address and on which ports its own is published, how GPUs
    are attached (one of NVIDIA, CDI, ENVIRONMENT, empty for not at all), and the engine's own hard limits, by
    name of a ulimit, -1 for none."""

    publish_at: str
    ports: range
    gpus: str = ""
    hard_limits: Mapping[str, int] = field(default_factory=dict)


def user(image: Image, strict: bool) -> str:
    """Whom its command runs as; empty for the superuser of the image."""
    name = image.user.partition(":")[0]
    if name not in ("", "root") and not (name.isdecimal() and int(name) == 0):
        return image.user
    return STRICT_USER if strict else ""


def command(plan: Plan, image: Image) -> tuple[str, ...]:
    """Program and arguments, templates not filled in; that of the image if the kernel has none."""
    if plan.shell:
        return (plan.shell, "-c", plan.line)
    return plan.argv or (*image.entrypoint, *image.command)


def has_own_command(plan: Plan) -> bool:
    return bool(plan.argv or plan.shell)


def body(
    plan: Plan,
    container: Container,
    image: Image,
    node: Node,
    *,
    labels: Mapping[str, str],
    binds: Sequence[Bind],
    command: Sequence[str],
    network: str,
) -> dict[str, Any]:
    """The body of the request that makes the container. `command` is empty for the image's own; `network` for
    the engine's default."""
    environ = {**plan.environ, **plan.injection.environ, "HOME": HOME, **_no_gpus(container)}
    if container.strict:
        # The root cannot be written: what looks for a place for temporary files finds one.
        environ.setdefault("TMPDIR", "/tmp")
    made: dict[str, Any] = {
        "Image": image.id,
        "Env": [f"{name}={value}" for name, value in environ.items()],
        "Labels": dict(labels),
        "User": user(image, container.strict),
        "HostConfig": {
            "Init": True,
            "RestartPolicy": {"Name": "no"},
            "Mounts": [
                {"Type": "bind", "Source": bind.source, "Target": bind.target, "ReadOnly": bind.read_only}
                for bind in (*binds, *plan.injection.binds)
            ],
            "LogConfig": {
                "Type": "json-file",
                "Config": {"max-size": LOG_FILE_SIZE, "max-file": LOG_FILES},
            },
            **_security(container.strict),
            **_limits(plan, container, node),
        },
    }
    if command:
        made |= {"Entrypoint": list(command[:1]), "Cmd": list(command[1:])}
    if has_own_command(plan):
        made["WorkingDir"] = plan.model_path
    settings = made["HostConfig"]
    if plan.injection.host_ipc:
        settings["IpcMode"] = "host"
    elif plan.shared_memory_bytes:
        settings["ShmSize"] = plan.shared_memory_bytes
    _add_network(made, plan, container, node, network)
    requests = device_requests(container, node.gpus)
    if requests:
        settings["DeviceRequests"] = requests
    return made


def device_requests(container: Container, gpus: str) -> list[dict[str, Any]]:
    """The granted GPUs by their UUIDs, none for devices that are only pretended."""
    ids = [device.id for device in container.devices if device.accelerator == "cuda"]
    if not ids or gpus == ENVIRONMENT:
        return []
    if gpus == CDI:
        return [{"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={id}" for id in ids]}]
    return [{"Driver": "nvidia", "DeviceIDs": ids, "Capabilities": [["gpu"]]}]


def _no_gpus(container: Container) -> dict[str, str]:
    ids = [device.id for device in container.devices if device.accelerator == "cuda"]
    # Images of CUDA ask for all GPUs, and a node whose default runtime is NVIDIA's would give them.
    return {"NVIDIA_VISIBLE_DEVICES": ",".join(ids) or "void"}


def _add_network(made: dict[str, Any], plan: Plan, container: Container, node: Node, network: str) -> None:
    settings = made["HostConfig"]
    if container.shares_network:
        settings["NetworkMode"] = "host"
        pairs = zip(container.names, container.addresses, strict=True)
        settings["ExtraHosts"] = [f"{name}:{address}" for name, address in pairs]
        return
    settings["NetworkMode"] = network or "default"
    made["Hostname"] = container.hostname
    made["ExposedPorts"] = {f"{plan.port}/tcp": {}}
    # The engine chooses, each time it starts the container, among those that do not rest after their use.
    first, last = node.ports[0], node.ports[-1]
    chosen = str(first) if first == last else f"{first}-{last}"
    settings["PortBindings"] = {f"{plan.port}/tcp": [{"HostIp": node.publish_at, "HostPort": chosen}]}
    if network:
        made["NetworkingConfig"] = {"EndpointsConfig": {network: {"Aliases": [container.hostname]}}}


def _security(strict: bool) -> dict[str, Any]:
    """The engine's own seccomp profile holds in both: nothing is said of it."""
    return {
        "SecurityOpt": ["no-new-privileges"],
        "CapDrop": ["ALL"] if strict else list(DROPPED),
        "ReadonlyRootfs": strict,
        "Tmpfs": {"/tmp": "rw,nosuid,nodev,mode=1777"} if strict else {},
    }


def _limits(plan: Plan, container: Container, node: Node) -> dict[str, Any]:
    found: dict[str, Any] = {"PidsLimit": PIDS_MAX}
    if plan.cpu_milli:
        found |= {"CpuPeriod": CPU_PERIOD_US, "CpuQuota": max(1000, plan.cpu_milli * CPU_PERIOD_US // 1000)}
    if plan.cpus:
        found |= {"CpusetCpus": plan.cpus, "CpusetMems": plan.memory_nodes}
    if plan.memory_bytes:
        memory = max(plan.memory_bytes, MEMORY_BYTES_MIN)
        # Equal: no swap beside it.
        found |= {"Memory": memory, "MemorySwap": memory}
    found["Ulimits"] = [
        {"Name": name, "Soft": limit, "Hard": limit}
        for name, wanted in ULIMITS.items()
        if name in node.hard_limits
        for limit in [_least(wanted, node.hard_limits[name])]
    ]
    return found


def _least(wanted: int, hard: int) -> int:
    """What can be set: more than the engine itself may have makes a start fail. -1 is no limit."""
    if -1 in (wanted, hard):
        return max(wanted, hard)
    return min(wanted, hard)
