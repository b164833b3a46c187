"""What an engine is asked to make for a kernel: a function of the plan, the image and the node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dure.agent.backends.base import HOME, Container, Plan

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


@dataclass(frozen=True)
class Image:
    """An image that is on this node."""

    id: str
    architecture: str
    user: str
    entrypoint: tuple[str, ...]
    command: tuple[str, ...]


@dataclass(frozen=True)
class Bind:
    """A real folder and where it appears."""

    source: str
    target: str
    read_only: bool


def user(image: Image, strict: bool) -> str:
    """Whom its command runs as; empty for the superuser of the image."""
    name = image.user.partition(":")[0]
    if name not in ("", "root", "0"):
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
    *,
    labels: Mapping[str, str],
    binds: Sequence[Bind],
    command: Sequence[str],
    publish_at: str,
    network: str,
    gpus: str,
) -> dict[str, Any]:
    """The body of the request that makes the container. `command` is empty for the image's own; `network` for
    the engine's default. `gpus` says how they are attached: `nvidia` or `cdi`."""
    environ = {**plan.environ, "HOME": HOME}
    strict = container.strict
    host = container.shares_network
    made: dict[str, Any] = {
        "Image": image.id,
        "Env": [f"{name}={value}" for name, value in environ.items()],
        "Labels": dict(labels),
        "User": user(image, strict),
        "HostConfig": {
            "Init": True,
            "RestartPolicy": {"Name": "no"},
            "Mounts": [
                {"Type": "bind", "Source": bind.source, "Target": bind.target, "ReadOnly": bind.read_only}
                for bind in binds
            ],
            "PidsLimit": PIDS_MAX,
            "LogConfig": {
                "Type": "json-file",
                "Config": {"max-size": LOG_FILE_SIZE, "max-file": LOG_FILES},
            },
            "SecurityOpt": ["no-new-privileges"],
            "CapDrop": ["ALL"] if strict else list(DROPPED),
            "ReadonlyRootfs": strict,
            "Tmpfs": {"/tmp": "rw,nosuid,nodev,mode=1777"} if strict else {},
            "NetworkMode": "host" if host else network or "default",
            **_limits(plan),
        },
    }
    if command:
        made |= {"Entrypoint": list(command[:1]), "Cmd": list(command[1:])}
    if has_own_command(plan):
        made["WorkingDir"] = plan.model_path
    settings = made["HostConfig"]
    if host:
        pairs = zip(container.names, container.addresses, strict=True)
        settings["ExtraHosts"] = [f"{name}:{address}" for name, address in pairs]
    else:
        made["Hostname"] = container.hostname
        made["ExposedPorts"] = {f"{plan.port}/tcp": {}}
        # The engine chooses the number, each time it starts the container.
        settings["PortBindings"] = {f"{plan.port}/tcp": [{"HostIp": publish_at, "HostPort": ""}]}
        if network:
            made["NetworkingConfig"] = {"EndpointsConfig": {network: {"Aliases": [container.hostname]}}}
    made["Env"] += _gpu_environ(container)
    requests = device_requests(container, gpus)
    if requests:
        settings["DeviceRequests"] = requests
    return made


def device_requests(container: Container, gpus: str) -> list[dict[str, Any]]:
    """The granted GPUs by their UUIDs, none for devices that are only pretended."""
    ids = [device.id for device in container.devices if device.accelerator == "cuda"]
    if not ids:
        return []
    if gpus == "cdi":
        return [{"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={id}" for id in ids]}]
    return [{"Driver": "nvidia", "DeviceIDs": ids, "Capabilities": [["gpu"]]}]


def _gpu_environ(container: Container) -> list[str]:
    if any(device.accelerator == "cuda" for device in container.devices):
        return []
    # Images of CUDA ask for all GPUs, and a node whose default runtime is NVIDIA's would give them.
    return ["NVIDIA_VISIBLE_DEVICES=void"]


def _limits(plan: Plan) -> dict[str, int]:
    found: dict[str, int] = {}
    if plan.cpu_milli:
        found |= {"CpuPeriod": CPU_PERIOD_US, "CpuQuota": max(1000, plan.cpu_milli * CPU_PERIOD_US // 1000)}
    if plan.memory_bytes:
        memory = max(plan.memory_bytes, MEMORY_BYTES_MIN)
        # Equal: no swap beside it.
        found |= {"Memory": memory, "MemorySwap": memory}
    if plan.shared_memory_bytes:
        found["ShmSize"] = plan.shared_memory_bytes
    return found
