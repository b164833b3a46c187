"""What stands on a container, so that an agent that lost everything else knows it again, and what the
engine says of it.

    dure.home        folder of the agent: whose it is
    dure.agent, dure.kernel, dure.session, dure.generation, dure.devices    for people and other tools
    dure.spec        the kernel's spec, without keys, base64; dure.spec-sha256 of the same
    dure.boot        the machine's boot in which it was made
    dure.gated       whether it waited for pre-start actions before its command
    dure.port        the port that its command binds; 0 where it has the node's network
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from dure.fleet.v1 import fleet_pb2

HOME, KERNEL, SESSION, BOOT = "dure.home", "dure.kernel", "dure.session", "dure.boot"
SPEC, GATED, PORT = "dure.spec", "dure.gated", "dure.port"
# The engine's word for "never".
_NEVER = "0001-01-01T00:00:00Z"


@dataclass(frozen=True)
class Seen:
    """A container as the engine tells of it. `started_at` is empty if it never ran; `port` is the published
    one, 0 if none is."""

    id: str
    status: str
    pid: int
    started_at: str
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


def labels(
    spec: fleet_pb2.KernelSpec, home: str, agent: str, boot_id: str, port: int, gated: bool
) -> dict[str, str]:
    """The labels of a new container."""
    kept = fleet_pb2.KernelSpec()
    kept.CopyFrom(spec)
    kept.ClearField("ssh_keys")
    data = kept.SerializeToString(deterministic=True)
    devices = [{"device": one.device, "slot": one.slot, "amount": one.amount} for one in spec.devices]
    return {
        HOME: home,
        "dure.agent": agent,
        KERNEL: spec.uid,
        SESSION: spec.session_uid,
        "dure.generation": str(spec.generation),
        "dure.devices": json.dumps(devices),
        SPEC: base64.b64encode(data).decode("ascii"),
        "dure.spec-sha256": hashlib.sha256(data).hexdigest(),
        BOOT: boot_id,
        GATED: "1" if gated else "",
        PORT: str(port),
    }


def spec_of(labels: Mapping[str, str]) -> fleet_pb2.KernelSpec | None:
    """The spec that stands on a container; None if it is not whole."""
    try:
        data = base64.b64decode(labels.get(SPEC, ""), validate=True)
        spec = fleet_pb2.KernelSpec.FromString(data)
    except (binascii.Error, ValueError, DecodeError):
        return None
    return spec if spec.uid and spec.uid == labels.get(KERNEL) else None


def seen(inspected: Mapping[str, Any]) -> Seen:
    """From the engine's answer to an inspection."""
    state, config = inspected["State"], inspected["Config"]
    labels = config.get("Labels") or {}
    started_at = str(state.get("StartedAt") or "")
    return Seen(
        id=inspected["Id"],
        status=str(state.get("Status", "")),
        pid=int(state.get("Pid") or 0),
        started_at="" if started_at.startswith(_NEVER[:10]) else started_at,
        exit_code=int(state.get("ExitCode") or 0),
        oom=bool(state.get("OOMKilled")),
        error=str(state.get("Error") or ""),
        port=_published(inspected.get("NetworkSettings") or {}, labels.get(PORT, "0")),
        stop_signal=str(config.get("StopSignal") or "SIGTERM"),
        labels=labels,
    )


def _published(network: Mapping[str, Any], port: str) -> int:
    places = (network.get("Ports") or {}).get(f"{port}/tcp") or []
    return int(places[0]["HostPort"]) if places else 0
