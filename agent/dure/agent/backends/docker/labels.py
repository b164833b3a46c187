"""What stands on a container, so that an agent that lost everything else knows it again, and what the
engine says of it.

    dure.agent-uid, dure.home    the agent whose it is: both must match, or it is somebody else's
    dure.agent, dure.kernel, dure.session, dure.generation, dure.endpoint, dure.image    for people and other
    tools dure.devices     the parts of devices that it holds
    dure.spec        the kernel's spec, without keys, base64; dure.spec-sha256 of the same
    dure.boot        the machine's boot in which it was made
    dure.gated       whether it waits for pre-start actions before its command
    dure.port        the port that its command binds in a network of its own, empty if it has none
    dure.leased-port the one that it binds in the node's network, empty if it has its own
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from google.protobuf.message import DecodeError

from dure.fleet.v1 import fleet_pb2

AGENT, HOME, KERNEL, SESSION, BOOT = (
    "dure.agent-uid",
    "dure.home",
    "dure.kernel",
    "dure.session",
    "dure.boot",
)
SPEC, SPEC_HASH, GATED = "dure.spec", "dure.spec-sha256", "dure.gated"
PORT, LEASED = "dure.port", "dure.leased-port"
# The engine's word for "never".
_NEVER = "0001-01-01T00:00:00Z"


@dataclass(frozen=True)
class Owner:
    """An agent: its uid, and its own folder. A copy of one does not own what the other made."""

    agent_uid: str
    home: str

    @property
    def labels(self) -> dict[str, str]:
        return {AGENT: self.agent_uid, HOME: self.home}

    @property
    def mark(self) -> str:
        """Six characters for names on the engine, on which agents may meet whose kernels have one uid."""
        return hashlib.sha256(f"{self.agent_uid} {self.home}".encode()).hexdigest()[:6]

    @property
    def filters(self) -> list[str]:
        """The same as the engine's filters take it."""
        return [f"{key}={value}" for key, value in self.labels.items()]


@dataclass(frozen=True)
class Seen:
    """A container as the engine tells of it. `started_s` is Unix time, 0 if it never ran; `port` is
    where the node reaches it: the published one, or that of the node which it binds itself; 0 if unknown."""

    id: str
    status: str
    pid: int
    started_s: float
    exit_code: int
    oom: bool
    error: str
    port: int
    stop_signal: str
    labels: Mapping[str, str]

    @property
    def running(self) -> bool:
        # One that is paused has not ended.
        return self.status in ("running", "paused", "restarting")

    @property
    def gated(self) -> bool:
        return bool(self.labels.get(GATED))

    @property
    def own_port(self) -> int:
        """The port that its command binds in a network of its own; 0 where it has the node's."""
        return int(self.labels.get(PORT) or 0)


def labels(
    spec: fleet_pb2.KernelSpec,
    owner: Owner,
    agent: str,
    boot_id: str,
    *,
    port: int,
    own_network: bool,
    gated: bool,
) -> dict[str, str]:
    """The labels of a new container, whose command binds the port."""
    kept = fleet_pb2.KernelSpec()
    kept.CopyFrom(spec)
    kept.ClearField("ssh_keys")
    data = kept.SerializeToString(deterministic=True)
    devices = [{"device": one.device, "slot": one.slot, "amount": one.amount} for one in spec.devices]
    return {
        **owner.labels,
        "dure.agent": agent,
        KERNEL: spec.uid,
        SESSION: spec.session_uid,
        "dure.image": spec.image,
        "dure.endpoint": f"{spec.project}/{spec.endpoint}",
        "dure.generation": str(spec.generation),
        "dure.devices": json.dumps(devices),
        SPEC: base64.b64encode(data).decode("ascii"),
        SPEC_HASH: hashlib.sha256(data).hexdigest(),
        BOOT: boot_id,
        GATED: "1" if gated else "",
        PORT: str(port) if own_network else "",
        LEASED: "" if own_network else str(port),
    }


def spec_of(labels: Mapping[str, str]) -> fleet_pb2.KernelSpec | None:
    """The spec that stands on a container; None if it is not whole."""
    try:
        data = base64.b64decode(labels.get(SPEC, ""), validate=True)
        if hashlib.sha256(data).hexdigest() != labels.get(SPEC_HASH):
            return None
        spec = fleet_pb2.KernelSpec.FromString(data)
    except (binascii.Error, ValueError, DecodeError):
        return None
    return spec if spec.uid and spec.uid == labels.get(KERNEL) else None


def seen(inspected: Mapping[str, Any]) -> Seen:
    """From the engine's answer to an inspection."""
    state, config = inspected["State"], inspected["Config"]
    labels = config.get("Labels") or {}
    return Seen(
        id=inspected["Id"],
        status=str(state.get("Status", "")),
        pid=int(state.get("Pid") or 0),
        started_s=unix_s(str(state.get("StartedAt") or "")),
        exit_code=int(state.get("ExitCode") or 0),
        oom=bool(state.get("OOMKilled")),
        error=str(state.get("Error") or ""),
        port=int(labels.get(LEASED) or 0)
        or _published(inspected.get("NetworkSettings") or {}, labels.get(PORT, "")),
        stop_signal=str(config.get("StopSignal") or "SIGTERM"),
        labels=labels,
    )


def ended(container: Seen, boot_id: str) -> dict[str, Any]:
    """The record of the end of a container that does not run, for `outcome.read`."""
    code = container.exit_code
    if container.labels.get(BOOT, boot_id) != boot_id:
        return _record("NODE_REBOOTED", -1, "the node was restarted while it ran")
    if not container.started_s:
        return _record("START_FAILED", code or -1, container.error or "the engine did not start it")
    if container.oom and code == 0:
        # The command outlived a child that was killed, and then gave up without an error.
        message = "a process of it used more memory than it was granted (mem) and was killed; it then exited"
        return _record("OOM", code, message)
    number = code - 128 if 128 < code < 128 + 65 else 0
    return {"stage": "command", "signal": number, "code": code, "oom": container.oom, "message": ""}


def unix_s(text: str) -> float:
    """Of the engine's times; 0 for never."""
    return unix_ns(text) / 1e9


def unix_ns(text: str) -> int:
    """Of the engine's times, with nanoseconds and `Z` or an offset; 0 for never. Raises ValueError."""
    if not text or text.startswith(_NEVER[:10]):
        return 0
    whole, dot, rest = text.partition(".")
    fraction = rest[: len(rest) - len(rest.lstrip("0123456789"))] if dot else ""
    zone = rest[len(fraction) :] if dot else ""
    seconds = datetime.fromisoformat((whole + zone).replace("Z", "+00:00")).timestamp()
    return int(seconds) * 10**9 + int(fraction[:9].ljust(9, "0"))


def _record(reason: str, code: int, message: str) -> dict[str, Any]:
    return {"reason": reason, "code": code, "message": message}


def _published(network: Mapping[str, Any], port: str) -> int:
    places = (network.get("Ports") or {}).get(f"{port}/tcp") or []
    return int(places[0]["HostPort"]) if places else 0
