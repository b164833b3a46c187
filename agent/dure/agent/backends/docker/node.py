"""What the engine and its node can do: limits, GPUs, folders. Looked at when the agent starts."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dure.agent.backends.docker.request import CDI, ENVIRONMENT, NVIDIA, ULIMITS

# Words of /proc/<pid>/limits.
_LIMIT_NAMES = {"nofile": "Max open files", "memlock": "Max locked memory", "nproc": "Max processes"}
# The processes whose limits containers inherit; the engine's own starts the others where it runs alone.
_STARTERS = ("dockerd", "containerd")
_CDI_FOLDERS = ("/etc/cdi", "/var/run/cdi")
_CDI_FILES_MAX = 100


def limitations(info: Mapping[str, Any], *, root: bool) -> list[str]:
    """What cannot be done, for people, by the engine's own account."""
    found = []
    missing = [
        word
        for word, key in (
            ("memory", "MemoryLimit"),
            ("swap", "SwapLimit"),
            ("CPU", "CpuCfsQuota"),
            ("processes", "PidsLimit"),
        )
        if info.get(key) is False
    ]
    if missing:
        found.append(f"the container engine cannot limit {', '.join(missing)} on this node")
    options = " ".join(info.get("SecurityOptions") or ())
    if "rootless" in options or "userns" in options:
        found.append(
            "the container engine maps users (rootless, or user namespaces): what sessions write to their "
            "home belongs to other users of the node"
        )
    if "seccomp" not in options:
        found.append("the container engine has no seccomp profile: system calls of sessions are not filtered")
    if not root:
        found.append("the agent is not root: it cannot measure all containers, nor remove files of theirs")
    return found


def chooses_ports(version: Mapping[str, Any]) -> bool:
    """Whether the engine takes a row of ports to publish one of them: podman takes one port only."""
    names = [str(part.get("Name", "")) for part in version.get("Components") or ()]
    return not any("podman" in name.lower() for name in names)


def gpus(info: Mapping[str, Any]) -> str:
    """How GPUs are attached; empty if they cannot be. `DURE_GPU_ATTACH=environment` is for engines whose
    default runtime gives the GPUs that the variable NVIDIA_VISIBLE_DEVICES names."""
    if os.environ.get("DURE_GPU_ATTACH") == ENVIRONMENT:
        return ENVIRONMENT
    if "nvidia" in (info.get("Runtimes") or {}):
        return NVIDIA
    if "CDISpecDirs" in info and _knows_cdi(info.get("CDISpecDirs") or _CDI_FOLDERS):
        return CDI
    return ""


def no_gpus(info: Mapping[str, Any]) -> str:
    """Why they cannot be attached, and what to do."""
    known = ", ".join(sorted(info.get("Runtimes") or {})) or "none"
    return (
        "the container engine cannot attach GPUs: it has no NVIDIA runtime (its runtimes: "
        f"{known}) and knows no CDI device `nvidia.com/gpu`; install NVIDIA's container toolkit, run "
        "`nvidia-ctk runtime configure`, and restart the engine and the agent"
    )


def hard_limits(engine_socket: str) -> dict[str, int]:
    """The least hard limits of the processes that containers come from, by name of a ulimit; -1 for none. One
    that cannot be told is left out, and is then not set."""
    pids = {_peer(engine_socket), *_named(_STARTERS)} - {0, 1}
    tables = [_limits(pid) for pid in pids]
    found: dict[str, int] = {}
    for name in ULIMITS:
        values = [table[name] for table in tables if name in table]
        if values:
            finite = [value for value in values if value >= 0]
            found[name] = min(finite) if finite else -1
    return found


def publish_at(host: str) -> str:
    """The address at which ports are published: the node's own if that is what `host` is, else all of
    them."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
    except OSError:
        return "0.0.0.0"
    return str(address[0])


def parse_limits(text: str) -> dict[str, int]:
    """Hard limits of /proc/<pid>/limits, by name of a ulimit; -1 for none."""
    found = {}
    for line in text.splitlines():
        for name, words in _LIMIT_NAMES.items():
            if line.startswith(words):
                hard = line[len(words) :].split()[1]
                found[name] = -1 if hard == "unlimited" else int(hard)
    return found


def _limits(pid: int) -> dict[str, int]:
    try:
        return parse_limits(Path(f"/proc/{pid}/limits").read_text(encoding="ascii"))
    except OSError:
        return {}


def _peer(engine_socket: str) -> int:
    """Pid of the process that listens at the socket; 0 if it cannot be told."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(5.0)
            probe.connect(engine_socket)
            data = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    except OSError:
        return 0
    return int(struct.unpack("3i", data)[0])


def _named(names: tuple[str, ...]) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if (folder / "comm").read_text(encoding="utf-8", errors="replace").strip() in names:
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def _knows_cdi(folders: Any) -> bool:
    for folder in map(Path, folders):
        try:
            files = sorted(folder.iterdir())[:_CDI_FILES_MAX]
        except OSError:
            continue
        for file in files:
            try:
                if "nvidia.com/gpu" in file.read_text(encoding="utf-8", errors="replace"):
                    return True
            except OSError:
                continue
    return False
